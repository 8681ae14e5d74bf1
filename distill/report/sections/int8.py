"""int8: the newest int8 file of each run beside the float32 file that it was made of."""

from __future__ import annotations

from typing import Any

from distill.report.comparison import HEAD_NAMES, Comparison
from distill.report.networks import on_threads
from distill.report.page import Column, Section, Table
from distill.report.runs import Record
from distill.report.statistics import PairedTest, mcnemar_of_counts, p_value, wilson

HEADS = {"fused": "", **{head: f", {HEAD_NAMES[head]}" for head in ("cls", "dist")}}
"""What a name ends in, by the head that was exported."""
COLUMNS: list[Column] = [
    ("model", "model", ""),
    ("top-1 %", "top1", ".2f"),
    ("95 % interval", "top1_interval", "{0[0]:.2f} to {0[1]:.2f}".format),
    ("against float32", "points", "+.2f"),
    ("95 % interval", "interval", "{0[0]:+.2f} to {0[1]:+.2f}".format),
    ("p", "p", p_value),
    ("decided alike %", "agreement", ".2f"),
    ("file, MB", "megabytes", ".2f"),
    ("one image, ms", "latency_ms", ".2f"),
    ("machine", "machine", str),
]


def int8_of(record: Record) -> PairedTest:
    """int8 against float32."""
    only = record["only_int8_right"], record["only_float32_right"]
    return mcnemar_of_counts("int8", "float32", *only, record["images"])


def build(comparison: Comparison) -> Section | None:
    records: list[dict[str, Any]] = []
    said = []
    for name, run in comparison.runs.items():
        if (measured := run.int8) is None:
            continue
        called, test = comparison.called(name, "student"), int8_of(measured)
        machine = measured["machine"] and on_threads(measured["machine"], measured["threads"])
        for index, precision in enumerate(("float32", "int8")):
            correct = measured["correct"][index]
            records.append(
                {
                    "model": f"{called}{HEADS[measured['head']]}, {precision}",
                    "top1": 100 * correct / measured["images"],
                    "top1_interval": wilson(correct, measured["images"]),
                    "megabytes": measured["bytes"][index] / 1e6,
                    "latency_ms": 1e3 * measured["latency_seconds"][index],
                    "machine": machine,
                }
            )
        records[-1] |= {
            "points": test.points,
            "interval": [test.low, test.high],
            "p": test.p,
            "agreement": 100 * measured["agreements"] / measured["images"],
            "words": test.words,
        }
        kept = f", {', '.join(measured['kept'])} left in float32" if measured["kept"] else ""
        said.append(f"int8 in place of float32 for {called}: {test.words}{kept}")
    if not records:
        return None
    caption = (
        "The ONNX files of the newest `distill export --int8`, float32 and int8 in turns by onnxruntime, on all test "
        "images. These speeds are onnxruntime's: do not compare them with those of other tables."
    )
    return Section("int8", "int8", f"{'; '.join(said)}.", [Table.of("int8", caption, records, COLUMNS)], records)
