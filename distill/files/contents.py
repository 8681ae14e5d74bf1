"""What a run directory holds, in words: its files, and the keys of `metrics.jsonl`.

docs/reference/run-files.md is made of it, and tests/docs/test_blocks.py compares it with a run.
"""

from __future__ import annotations

RUN_FILES = {
    "recipe.yaml": "The recipe as it was given.",
    "resolved.yaml": "The recipe with every key explicit; it reproduces the run.",
    "environment.json": "Versions, machine, processes, precision, threads.",
    "status.json": "How the run stands, or ended.",
    "metrics.jsonl": "One JSON object per event and line.",
    "train.log": "The log, with the stack traces of errors.",
    "checkpoints/": "The newest ones (`train.keep_checkpoints`) and the best.",
    "test_split.txt": "The images that `data.test` held out, if it is set.",
    "predictions.safetensors": "Labels of the test images, and the logits of each head and of the teacher, from the "
    "exported weights; of a run without labels the logarithm of the shares of its neighbours' votes.",
    "export/": "The student as a folder of timm's.",
    "analysis.json": "For the report: corruptions, speed.",
    "analysis.safetensors": "For the report: validation logits, attention.",
    "report.html": "Teacher, student and control side by side; with `report.md`, `report.json` and curves as `.svg`.",
    "int8.json": "What the newest `distill export --int8` measured; [The report](../explanation/report.md) has its "
    "keys.",
    "control/": "The control's run, with the same files.",
}
"""By name; a folder's ends in /."""

METRICS = {
    "event": "What happened: `start`, `resume`, `preflight`, `epoch`, `train`, `eval`, `checkpoint`, `control`.",
    "step": "Optimizer steps that were done.",
    "epoch": "Epochs that were done, in fractions.",
    "time": "Seconds since 1970.",
    "loss": "`train`: the weighted sum of all parts; a mean since the last such line, as the others are.",
    "loss/PART": "`train`: `label`, and each method, unweighted.",
    "weight/METHOD": "`train`: the weight of a method that has a schedule.",
    "METHOD/NAME": "`train`: what a method measures, such as `dino/kl`.",
    "gradient_share/PART": "`train`: the part's share of the gradient norms, with `train.log_gradient_share`.",
    "lr": "`train`: the learning rate.",
    "images_per_second": "`train`: speed of training, over all processes.",
    "data_wait": "`train`: fraction of the time spent waiting for the loader.",
    "bad_steps": "`train`: steps that were skipped, if any, since the loss or its gradients were not finite.",
    "teacher_cache/hits": "`train`: fraction of the teacher's logits that came from the cache.",
    "batch": "`epoch`: SHA-256 of the first image of its first batch.",
    "device": "`epoch`: type of the device that it was augmented on, such as `cpu`.",
    "split": "`eval`: `validation` or `test`.",
    "weights": "`eval`: `raw`, or `ema`, their moving average.",
    "student/top1": "`eval`: accuracy in percent, of the mean of both heads.",
    "student/macro": "`eval`: macro accuracy in percent, the mean of the accuracies of the classes.",
    "student/worst_class": "`eval`: the lowest of these accuracies.",
    "student/top5": "`eval`: top-5 accuracy in percent.",
    "student/nll": "`eval`: mean negative log-likelihood of the labels, in nats.",
    "student.cls/top1": "`eval`: the same of the class head; `student.dist/top1` of the distillation head.",
    "teacher/top1": "`eval`, `preflight`: accuracy of the teacher in percent.",
    "agreement": "`eval`: images in percent for which student and teacher decide alike.",
    "student/knn": "`eval`: accuracy in percent of the votes of nearest neighbours.",
    "student/linear": "`eval`: accuracy in percent of a linear probe on the features.",
    "student/spread": "`eval`: 0 if all features have one direction.",
}
"""By key of a line of `metrics.jsonl`; words in capitals stand for names."""
