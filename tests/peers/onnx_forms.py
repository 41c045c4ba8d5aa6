"""The ONNX forms that ONNX Runtime is measured with, from the weights of the forge's f32 bundle.

The bundle's own graph uses the standard's Attention, which copies the whole past each step. ONNX Runtime is
faster with its own operators, as its generative builder uses them: GroupQueryAttention with the rotary
embedding in it, packed q, k and v, a past that is written in place, and residual and norm in one. That is the
graph drawn here; `rows` selects the positions that get logits, so that one graph serves both those who want
all and those who want the last.
"""

from pathlib import Path

import numpy
import onnx
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"


class Source:
    """The f32 bundle's weights by name, and the numbers that shape the graph."""

    def __init__(self, bundle: Path):
        model = onnx.load(bundle / "model.onnx")
        self.weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.layers = sum(node.op_type == "Attention" for node in model.graph.node)
        attention = self.attributes(model, "Attention")
        self.heads, self.kv_heads = attention["q_num_heads"], attention["kv_num_heads"]
        self.scale = attention["scale"]
        self.epsilon = self.attributes(model, "RMSNormalization")["epsilon"]
        self.vocab, self.width = self.weights["embed.weight"].shape
        self.head_dim = 2 * self.weights["rope.cos"].shape[1]

    @staticmethod
    def attributes(model: onnx.ModelProto, op_type: str) -> dict:
        node = next(node for node in model.graph.node if node.op_type == op_type)
        return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


class Graph:
    """Collects nodes and initializers; every node's output is named after it."""

    def __init__(self, source: Source):
        self.source = source
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def tensor(self, name: str, value: numpy.ndarray) -> str:
        self.tensors.append(numpy_helper.from_array(numpy.ascontiguousarray(value), name))
        return name

    def node(self, op: str, name: str, inputs: list[str], extra: tuple[str, ...] = (), domain: str = "", **attributes) -> str:
        out = f"{name}.out"
        self.nodes.append(helper.make_node(op, inputs, [out, *extra], name=name, domain=domain, **attributes))
        return out

    def linear(self, name: str, x: str, *parts: str) -> str:
        """`parts` beside one another along the outputs."""
        weights = self.source.weights
        joined = numpy.concatenate([weights[f"{part}.weight"] for part in parts], axis=1)
        return self.node("MatMul", name, [x, self.tensor(f"{name}.weight", joined)])

    def norm(self, name: str, residual: str, branch: str) -> tuple[str, str]:
        """The sum of both, normed, and the sum itself."""
        gamma = self.tensor(f"{name}.gamma", self.source.weights[f"{name}.gamma"])
        total = f"{name}.sum"
        inputs, epsilon = [residual, branch, gamma], self.source.epsilon
        op = "SkipSimplifiedLayerNormalization"
        return self.node(op, name, inputs, ("", "", total), domain=MICROSOFT, epsilon=epsilon), total

    def attention(self, layer: int, x: str) -> str:
        at, source = f"layers.{layer}", self.source
        qkv = self.linear(f"{at}.qkv_proj", x, *(f"{at}.{part}_proj" for part in "qkv"))
        past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        inputs = [qkv, "", "", *past, "seqlens_k", "total_sequence_length", "rope.cos", "rope.sin"]
        out = self.node(
            "GroupQueryAttention",
            f"{at}.attention",
            inputs,
            tuple(name.replace("past_key_values", "present") for name in past),
            domain=MICROSOFT,
            num_heads=source.heads,
            kv_num_heads=source.kv_heads,
            scale=source.scale,
            do_rotary=1,
        )
        return self.linear(f"{at}.o_proj", out, f"{at}.o_proj")

    def mlp(self, layer: int, x: str) -> str:
        at = f"layers.{layer}"
        gate = self.linear(f"{at}.gate_proj", x, f"{at}.gate_proj")
        up = self.linear(f"{at}.up_proj", x, f"{at}.up_proj")
        silu = self.node("Mul", f"{at}.silu", [gate, self.node("Sigmoid", f"{at}.sigmoid", [gate])])
        return self.linear(f"{at}.down_proj", self.node("Mul", f"{at}.gated", [silu, up]), f"{at}.down_proj")

    def draw(self) -> None:
        weights = self.source.weights
        self.tensor("rope.cos", weights["rope.cos"])
        self.tensor("rope.sin", weights["rope.sin"])
        x = self.node("Gather", "embed", [self.tensor("embed.weight", weights["embed.weight"]), "input_ids"])
        gamma = self.tensor("layers.0.attn_norm.gamma", weights["layers.0.attn_norm.gamma"])
        normed = self.node("RMSNormalization", "layers.0.attn_norm", [x, gamma], axis=-1, epsilon=self.source.epsilon)
        for layer in range(self.source.layers):
            normed, x = self.norm(f"layers.{layer}.mlp_norm", x, self.attention(layer, normed))
            last = layer + 1 == self.source.layers
            following = "final_norm" if last else f"layers.{layer + 1}.attn_norm"
            normed, x = self.norm(following, x, self.mlp(layer, normed))
        chosen = self.node("Gather", "chosen", [normed, "rows"], axis=1)
        head = self.tensor("head.weight", weights["embed.weight"].T)
        self.nodes.append(helper.make_node("MatMul", [chosen, head], ["logits"], name="head"))

    def model(self) -> onnx.ModelProto:
        self.draw()
        source, value = self.source, helper.make_tensor_value_info
        inputs = [
            value("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            value("seqlens_k", TensorProto.INT32, ["batch"]),
            value("total_sequence_length", TensorProto.INT32, []),
            value("rows", TensorProto.INT64, ["rows"]),
        ]
        outputs = [value("logits", TensorProto.FLOAT, ["batch", "rows", source.vocab])]
        cache = ["batch", source.kv_heads, "capacity", source.head_dim]
        for layer in range(source.layers):
            for kind in ["key", "value"]:
                inputs.append(value(f"past_key_values.{layer}.{kind}", TensorProto.FLOAT, cache))
                outputs.append(value(f"present.{layer}.{kind}", TensorProto.FLOAT, cache))
        graph = helper.make_graph(self.nodes, "gqa", inputs, outputs, self.tensors)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def write_f32(bundle: Path, out: Path) -> None:
    onnx.save(Graph(Source(bundle)).model(), out)


def write_dynamic_int8(f32: Path, out: Path) -> None:
    """Weights int8 per output channel, activations uint8 per tensor, quantised as they come; the embedding stays f32."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        f32,
        out,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": TensorProto.FLOAT},
    )


def write_nbits8(f32: Path, out: Path) -> None:
    """MatMulNBits: 8 bits, symmetric, blocks of 32, int8 activations (accuracy level 4)."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(f32), bits=8, block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    onnx.save(quantizer.model.model, out)
