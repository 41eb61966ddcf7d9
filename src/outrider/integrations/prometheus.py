"""Statistics of finished requests as Prometheus metrics; what vLLM measures, too, has vLLM's name behind our prefix.

    metrics = Metrics("llama-8b")
    prometheus_client.start_http_server(8000, registry=metrics.registry)
    for result in engine.generate(prompts):
        metrics.observe(result)

Needs the package prometheus-client: pip install 'outrider[metrics]'.
"""

from __future__ import annotations

from typing import Any

from outrider.decoding.outrider import Result
from outrider.decoding.statistics import Statistics
from outrider.errors import OptionError

PREFIX = "outrider:"
LABELS = ("model_name", "mode")
COUNTERS = {  # name, without the _total that the client adds -> field of Statistics, what it counts
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "generation_tokens": ("generated_tokens", "Generated tokens."),
    "spec_decode_num_drafts": ("rounds", "Rounds of speculative decoding."),
    "spec_decode_num_draft_tokens": ("drafted", "Drafted tokens."),
    "spec_decode_num_accepted_tokens": ("accepted", "Drafted tokens that were accepted."),
    "listed_tokens": ("listed", "Tokens on the lists that the target read, averaged over layers and heads, by round."),
    "cached_tokens": ("cached", "Tokens in the cache, by round: what dense rounds would have read."),
    "kv_bytes_read": ("bytes_read", "Bytes of keys and values that were read, scoring counted in."),
    "kv_bytes_dense": ("bytes_dense", "Bytes of keys and values that dense verification would have read."),
    "tentative_tokens": ("tentative", "Tokens of sparse rounds that a dense forward had to confirm."),
    "confirmed_tokens": ("confirmed", "Tentative tokens that were confirmed."),
    "rolled_back_tokens": ("rolled_back", "Tentative tokens that were not."),
    "confirmations": ("confirmations", "Dense forwards over tentative tokens."),
    "drafted_on_tokens": ("drafted_on", "Drafted tokens that passed behind tentative ones."),
    "guard_audits": ("audits", "Rounds that the quality guard has audited."),
    "guard_audited_positions": ("audited_positions", "Positions of audited rounds."),
    "guard_differed": ("differed", "Disagreement of sparse and dense target at these positions, summed."),
    "guard_recalled": ("recalled", "Share of the dense target's attention that was to listed tokens, summed over audits."),
    "guard_budget_raised": ("budget_raised", "Times that the guard let a request read more."),
    "guard_budget_lowered": ("budget_lowered", "Times that it let one read less again."),
    "guard_fallbacks": ("fallbacks", "Requests that the guard let read everything from some token on."),
    "predicted_seconds": ("predicted_seconds", "What rounds were to take, by what they cost when the engine began to run."),
    "audited_tokens": ("audited", "Tokens that were checked against the dense target."),
    "agreed_tokens": ("agreed", "Audited tokens that the dense target would also have chosen."),
}
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)  # upper ends of the histograms' buckets


class Metrics:
    """Counters and histograms of one model, in a registry of prometheus_client."""

    def __init__(self, model_name: str, registry: Any = None) -> None:
        """`registry` is a CollectorRegistry; None: a new one.

        Raises OptionError without prometheus-client, ValueError (the client's) where the registry has these metrics already.
        """
        try:
            import prometheus_client
        except ImportError as error:
            raise OptionError("metrics", "no prometheus-client", "pip install 'outrider[metrics]', which brings it") from error

        def counter(name: str, text: str, *labels: str) -> prometheus_client.Counter:
            return prometheus_client.Counter(PREFIX + name, text, [*LABELS, *labels], registry=self.registry)

        def histogram(name: str, text: str) -> prometheus_client.Histogram:
            return prometheus_client.Histogram(PREFIX + name, text, LABELS, registry=self.registry, buckets=SECONDS)

        self.registry = prometheus_client.CollectorRegistry() if registry is None else registry
        self._model_name, self._expose = model_name, prometheus_client.generate_latest
        self._counters = {field: counter(name, text) for name, (field, text) in COUNTERS.items()}
        self._requests = counter("request_success", "Finished requests, by why they ended.", "finished_reason")
        self._accepted_at = counter("spec_decode_num_accepted_tokens_per_pos", "Accepted tokens by position.", "position")
        self._chosen = counter("rounds", "Rounds by how they were run.", "choice")
        self._stages = counter("stage_seconds", "Seconds of the device by stage.", "stage")
        self._prefill = histogram("request_prefill_time_seconds", "Seconds of reading the prompt.")
        self._decode = histogram("request_decode_time_seconds", "Seconds from the first round to the last.")

    def observe(self, result: Result) -> None:
        """Count a finished request."""
        labels = {"model_name": self._model_name, "mode": result.statistics.mode}
        self._requests.labels(**labels, finished_reason=result.finish_reason).inc()
        self._count(result.statistics, labels)

    def text(self) -> str:
        """All metrics of the registry in Prometheus' text format."""
        return self._expose(self.registry).decode()

    def _count(self, statistics: Statistics, labels: dict[str, str]) -> None:
        for field, counter in self._counters.items():
            counter.labels(**labels).inc(getattr(statistics, field))
        for position, accepted in enumerate(statistics.accepted_at):
            self._accepted_at.labels(**labels, position=position).inc(accepted)
        for choice, rounds in statistics.chosen.items():
            self._chosen.labels(**labels, choice=choice).inc(rounds)
        for stage, seconds in statistics.seconds.items():
            self._stages.labels(**labels, stage=stage).inc(seconds)
        self._prefill.labels(**labels).observe(statistics.seconds["prefill"])
        self._decode.labels(**labels).observe(statistics.decode_seconds)
