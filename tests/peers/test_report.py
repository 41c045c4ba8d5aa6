"""The pure parts, with the standard library alone: python3 -B -m unittest discover -s tests/peers"""

import ast
import unittest
from pathlib import Path

import others
import report
import targets

ABOUT = {"file_bytes": 145e6, "perplexity": 17.0, "kl_divergence": 0.005, "all_logits": False}


def row(engine, decode, threads=1, batch=1, prompt=80, prefill=100.0, resident=100e6, **about):
    sample = {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode, "load_ms": 7.0, "resident_bytes": resident}
    sample |= {"read_bandwidth_gb_s": 40.0, "bytes_per_token": 143e6, "tokenizer_bytes": 8e6}
    return report.row(engine, (threads, batch, prompt), [sample], ABOUT | about)


class Rows(unittest.TestCase):
    def test_a_row_is_the_median_of_its_rounds(self):
        samples = [{"prefill_tokens_per_s": rate, "decode_tokens_per_s": 2 * rate} for rate in (9.0, 1.0, 4.0)]
        made = report.row("llama.cpp Q8_0", (2, 4, 512), samples, ABOUT)
        self.assertEqual((made["prefill_tokens_per_s"], made["decode_tokens_per_s"]), (4.0, 8.0))
        self.assertEqual((made["threads"], made["batch"], made["prompt_tokens"]), (2, 4, 512))
        self.assertIsNone(made["resident_bytes"])
        self.assertEqual(len(made["samples"]), 3)

    def test_four_bits_are_compared_with_four_bits_where_there_are_some(self):
        rows = [row(report.OURS, 200.0), row("llama.cpp Q4_0", 100.0)]
        self.assertEqual(report.beside(rows, rows[1])["engine"], report.OURS)
        rows.append(row(report.OURS_4BIT, 300.0))
        self.assertEqual(report.beside(rows, rows[1])["engine"], report.OURS_4BIT)
        self.assertIsNone(report.beside(rows, rows[2]))

    def test_the_table_has_a_line_for_each_row_and_columns_that_end_together(self):
        rows = [row(report.OURS, 200.0), row("llama.cpp Q8_0", 100.0), row(report.OURS, 210.5, threads=2)]
        head, gap, first, second, between, third = report.table(rows).splitlines()
        self.assertEqual((gap, between), ("", ""))
        self.assertEqual(len({len(line) for line in (head, first, second, third)}), 1)
        self.assertIn("2.00", second)
        self.assertEqual(third[: head.index("decode tok/s") + len("decode tok/s")].split()[-1], "210.5")


class Targets(unittest.TestCase):
    def test_what_is_missed_is_a_share_of_the_bound(self):
        self.assertEqual(targets.Check("", 1.5, 1.5).verdict(), "met")
        self.assertEqual(targets.Check("", 1.2, 1.5).verdict(), "missed by 20.0 %")
        self.assertEqual(targets.Check("", 110.0, 100.0, at_least=False).verdict(), "missed by 10.0 %")
        self.assertEqual(targets.Check("", 90.0, 100.0, at_least=False).verdict(), "met")
        self.assertEqual(targets.Check("", None, 1.5).verdict(), "not measured")

    def found(self, checks, words):
        return next(check for check in checks if words in check.what)

    def test_two_threads_have_their_own_bound(self):
        rows = [row(name, rate, threads) for threads in (1, 2) for name, rate in ((report.OURS, 180.0), ("llama.cpp Q8_0", 100.0))]
        checks = targets.speed(rows)
        self.assertEqual(self.found(checks, "Q8_0, 1 thread,").verdict(), "met")
        self.assertEqual(self.found(checks, "Q8_0, 2 threads,").verdict(), "missed by 10.0 %")
        self.assertAlmostEqual(self.found(checks, "share of bandwidth").measured, 180 * 143e6 / 40e9)
        self.assertIsNone(self.found(checks, "q4 / llama.cpp Q4_1").measured)

    def test_four_tasks_and_memory(self):
        rows = [row(report.OURS, 100.0, resident=200e6), row(report.OURS, 260.0, batch=4), row("llama.cpp Q4_1", 90.0)]
        self.assertEqual(targets.together(rows)[0].measured, 2.6)
        checks = targets.memory(rows, kv_bytes_per_token=23_040, decode=64)
        self.assertAlmostEqual(self.found(checks, "design's figure").bound, 1.15 * 143 + 0.02304 * 144 + 8 + 15)
        self.assertEqual(self.found(checks, "the smallest peer").verdict(), "missed by 100.0 %")
        self.assertEqual(self.found(checks, "8-bit").verdict(), "not measured")


class Sources(unittest.TestCase):
    def test_every_file_parses_and_says_what_it_is(self):
        for file in Path(__file__).parent.glob("*.py"):
            self.assertTrue(ast.get_docstring(ast.parse(file.read_text())), file.name)

    def test_the_kernel_tells_processor_time(self):
        self.assertGreater(others.machine_cpu_s(), 0)
        self.assertGreaterEqual(others.process_cpu_s(1), 0)


if __name__ == "__main__":
    unittest.main()
