"""vLLM with dummy weights: `python -P -m outrider.bench.peers.vllm`, a job on stdin.

The target alone, or with the draft model and synthetic acceptance, at vLLM's own settings otherwise. Its prefix cache keeps the
prompts, so that decoding can be timed alone; where the prompts themselves are timed there is none.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from outrider.bench.peers.job import REPEATS, Job, decoding, first_token, read_job, serve
from outrider.bench.prompts import random_prompts

ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process: nothing is left behind when it is ended
}
ROOM = 1024  # tokens behind the longest context


def engine_arguments(job: Job, folder: Path) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; the config.json of each model is written into a folder of its own below `folder`."""
    longest = max(case["context"] for case in job.cases)
    arguments: dict[str, Any] = {
        "model": _write_config(folder / "target", job.target),
        "load_format": "dummy",
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": longest + max(ROOM, 2 * job.tokens),
        "gpu_memory_utilization": 0.9,
        "enable_prefix_caching": job.what == "decode",
    }
    if job.draft is not None:
        arguments["speculative_config"] = {
            "method": "draft_model",
            "model": _write_config(folder / "draft", job.draft),
            "num_speculative_tokens": len(job.rates),
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": job.rates,
        }
    return arguments


class Steps:
    """Counts the steps of an engine."""

    def __init__(self, engine: Any) -> None:
        self.taken = 0
        step = engine.step

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.taken += 1
            return step(*args, **kwargs)

        engine.step = counted


def measure(llm: Any, steps: Steps, job: Job, case: dict[str, Any]) -> dict[str, Any]:
    """Decoding speed of one case; the prompts of its rows differ."""
    from vllm import SamplingParams

    rows = random_prompts(case["context"], case["batch"], job.target["vocab_size"])
    prompts = [{"prompt_token_ids": row} for row in rows]

    def generate(count: int) -> int:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        before = steps.taken
        llm.generate(prompts, params, use_tqdm=False)
        return steps.taken - before

    seconds, rounds = decoding(generate, job.tokens)  # rounds of the sequence that was done last
    return {
        "tokens_per_second": case["batch"] * job.tokens / seconds,
        "tokens_per_round": job.tokens / rounds if rounds > 0 else None,
        "versions": {"vllm": version("vllm"), "transformers": version("transformers")},
    }


def measure_prefill(llm: Any, job: Job, case: dict[str, Any]) -> dict[str, Any]:
    """Seconds to the first token of one case, whose prompts come one after the other."""
    from vllm import SamplingParams

    rows = random_prompts(case["context"], REPEATS + 1, job.target["vocab_size"])
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    seconds = first_token(lambda number: llm.generate([{"prompt_token_ids": rows[number]}], params, use_tqdm=False))
    return {"seconds": seconds, "versions": {"vllm": version("vllm"), "transformers": version("transformers")}}


def _write_config(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def main() -> None:
    from vllm import LLM

    job = read_job()
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(**engine_arguments(job, Path(folder)))
        if job.what == "prefill":
            serve(job, lambda case: measure_prefill(llm, job, case))
            return
        steps = Steps(llm.llm_engine)
        serve(job, lambda case: measure(llm, steps, job, case))


if __name__ == "__main__":
    main()
