"""The GGUF forms that llama.cpp is measured with, from the very file that the forge makes its bundles of."""

import ctypes
from pathlib import Path

import gguf
import numpy

FILE_TYPE_ALL_F32 = 0


def write_f32(source: Path, out: Path) -> None:
    """The same tensors and metadata, every weight dequantised."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(out, architecture)
    ours = {gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE, gguf.Keys.General.QUANTIZATION_VERSION}
    for key, field in reader.fields.items():
        if key in ours or key.startswith("GGUF."):
            continue
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], element)
    writer.add_file_type(FILE_TYPE_ALL_F32)
    for tensor in reader.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
        writer.add_tensor(tensor.name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(f32: Path, out: Path, kind: str) -> None:
    """llama.cpp's own quantiser with its defaults; `kind` is Q8_0 or Q4_0."""
    import llama_cpp
    from engine_llama import initialise

    initialise()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(str(f32).encode(), str(out).encode(), ctypes.byref(params)) != 0:
        raise RuntimeError(f"llama.cpp could not quantise {f32} to {kind}")
