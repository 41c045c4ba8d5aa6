"""The pure parts, with the standard library alone: python3 -B -m unittest discover -s tests/forms"""

import ast
import tempfile
import unittest
from pathlib import Path

import results

ABOUT = {"model": "tiny", "text": "LICENSE", "window": 512, "onnxruntime": "1.32.0"}
ROW = {
    "inspect": {"fused": [152, 153], "plan": "flat", "exact": False},
    "ours": {"kl_divergence": 0.0123456, "top1_agreement": 0.9},
    "own": {"kl_divergence": 2e-6},
    "onnxruntime": {"error": "NotImplemented", "message": "no kernel"},
}


def sample(rate, size=100):
    return {"decode_tokens_per_s": rate, "bytes_per_token": size}


class Resuming(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.file = Path(folder.name) / "results.json"

    def test_a_stopped_run_goes_on_with_the_forms_that_are_missing(self):
        found = results.load(self.file, ABOUT)
        self.assertEqual(results.pending(found, ["f16", "q4"], "ours"), ["f16", "q4"])
        results.put(found, "f16", ROW, ["f16", "q4"])
        results.keep(self.file, found)
        again = results.load(self.file, ABOUT)
        self.assertEqual(results.pending(again, ["f16", "q4"], "ours"), ["q4"])
        self.assertEqual(results.pending(again, ["f16", "q4"], "speed"), ["f16", "q4"])
        self.assertEqual([path.name for path in self.file.parent.iterdir()], [self.file.name])

    def test_rows_stand_in_one_order_and_keep_what_an_earlier_pass_found(self):
        found = {"rows": {"phi": {}, "q4": ROW}}
        results.put(found, "f16", ROW, ["f16", "q4"])
        results.put(found, "q4", {"speed": {"ratio": 1.0}}, ["f16", "q4"])
        self.assertEqual(list(found["rows"]), ["f16", "q4", "phi"])
        self.assertEqual(found["rows"]["q4"], ROW | {"speed": {"ratio": 1.0}})

    def test_results_of_something_else_are_refused_and_what_is_not_said_is_not(self):
        results.keep(self.file, results.load(self.file, {"model": "tiny"}))
        results.keep(self.file, results.load(self.file, ABOUT))
        self.assertEqual(results.load(self.file, {"model": "tiny"})["about"], ABOUT)
        with self.assertRaisesRegex(results.Mismatch, "window 512, not 256"):
            results.load(self.file, ABOUT | {"window": 256})


class Speed(unittest.TestCase):
    def test_each_round_is_held_to_its_neighbours_and_the_middle_one_counts(self):
        # The machine slows down to a half; the form does not change beside the native one, but for one odd round.
        natives = [sample(rate) for rate in (8.0, 8.0, 4.0, 4.0)]
        forms = [sample(rate, 120) for rate in (4.0, 6.0, 2.0)]
        self.assertAlmostEqual(results.speed(natives, forms)["ratio"], 0.5 * 1.2)


class Table(unittest.TestCase):
    def test_a_row_has_figures_and_says_in_a_word_why_one_is_missing(self):
        found = {"about": ABOUT, "reference": {"tokens": 511, "perplexity": 17.0, "window": 256}, "rows": {"q4": ROW}}
        title, gap, head, rule, row = results.markdown(found).splitlines()
        self.assertEqual(gap, "")
        self.assertIn("511 tokens of LICENSE predicted, in windows of 256", title)
        self.assertEqual(len({line.count("|") for line in (head, rule, row)}), 1)
        expected = "`q4` | yes | 152 / 153 | flat | no | 0.900 | 0.01235 | 0.00000 | NotImplemented | -"
        self.assertEqual(row, f"| {expected} |")

    def test_a_form_that_does_not_load_and_one_of_which_only_the_speed_is_known(self):
        fails = {"error": "fails", "message": "..."}
        rows = {"phi": {"inspect": fails, "ours": fails, "own": fails}, "q4": {"speed": {"ratio": 0.987}}}
        *_, broken, fast = results.markdown({"about": {"model": "tiny"}, "rows": rows}).splitlines()
        self.assertEqual(broken, "| `phi` | no | - | - | - | fails | fails | fails | - | - |")
        self.assertEqual(fast, "| `q4` | - | - | - | - | - | - | - | - | 0.99 |")


class Sources(unittest.TestCase):
    def test_every_file_parses_and_says_what_it_is(self):
        for file in Path(__file__).parent.glob("*.py"):
            self.assertTrue(ast.get_docstring(ast.parse(file.read_text())), file.name)


if __name__ == "__main__":
    unittest.main()
