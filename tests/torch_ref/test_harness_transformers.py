"""A real model in fp32 through lm-evaluation-harness, by our adapter and by the harness's own Hugging Face backend."""

from __future__ import annotations

import local_tasks
import pytest

import tinygptq
from tinygptq.measure.harness import harness_model
from tinygptq.measure.harness_run import Options, _task_manager, run_tasks

torch = pytest.importorskip("torch")
lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow
LIMIT = 8
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello there."},
    {"role": "user", "content": "Count to 3."},
    {"role": "assistant", "content": "1, 2"},
]


def responses(samples: dict[str, list]) -> dict[str, list]:
    """What the model answered to every request, by task, in the documents' order."""
    return {
        task: [answer for sample in sorted(found, key=lambda one: one["doc_id"]) for answer in sample["resps"]]
        for task, found in samples.items()
    }


def test_every_answer_is_that_of_the_hugging_face_backend(smollm2, tmp_path):
    from lm_eval.models.huggingface import HFLM

    folder = local_tasks.write_tasks(tmp_path / "tasks")
    model = tinygptq.load(smollm2, context=1024)
    ours = run_tasks(model, list(local_tasks.TASKS), Options(include=folder, limit=LIMIT))
    reference = HFLM(pretrained=str(smollm2), dtype="float32", device="cpu", batch_size=4)
    for history, open_ended in ((TALK[:3], True), (TALK, False)):
        ours_written = harness_model(model).apply_chat_template(history, add_generation_prompt=open_ended)
        assert ours_written == reference.apply_chat_template(history, add_generation_prompt=open_ended)
        assert harness_model(model).tok_encode(ours_written) == reference.tok_encode(ours_written)
    names = list(local_tasks.TASKS)
    manager = _task_manager(names, folder)
    theirs = lm_eval.simple_evaluate(reference, tasks=names, limit=LIMIT, task_manager=manager, log_samples=True)
    found, expected = responses(ours.samples), responses(theirs["samples"])
    worst = 0.0
    for task in ("local_letters", "local_endings"):
        assert len(found[task]) == len(expected[task]) == 4 * LIMIT
        for ((mine, my_greedy),), ((other, other_greedy),) in zip(found[task], expected[task], strict=True):
            worst = max(worst, abs(float(mine) - float(other)))
            assert str(my_greedy) == str(other_greedy)
    for (mine,), (other,) in zip(found["local_rolling"], expected["local_rolling"], strict=True):
        assert float(mine) == pytest.approx(float(other), abs=1e-3)
    print(f"largest difference of a log-likelihood: {worst:.2g}")
    assert worst < 1e-3
    assert found["local_answers"] == expected["local_answers"]
    for task, metrics in ours.results["tasks"]["results"].items():
        if "acc,none" in metrics:
            assert metrics["acc,none"] == theirs["results"][task]["acc,none"]
