"""A decode step that is the last one moved on is the step that would have been made anew."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from families import make_family
from polymoe.engine.continued_decode import ContinuedDecode
from polymoe.engine.core import EngineCore
from polymoe.engine.model_runner import ModelRunner
from polymoe.engine.scheduling.step_record import ScheduledSequence
from polymoe.offline.api import make_plan
from polymoe.protocol.request import EngineRequest, SequenceId, TokenSampling
from servers import engine_config


class Compared:
    """Makes every step that was moved on anew, and compares."""

    def __init__(self, runner: ModelRunner, continued: ContinuedDecode) -> None:
        self.runner, self.continued = runner, continued
        self.moved = self.made = 0

    def keep(self, *given: Any) -> None:
        self.made += 1
        self.continued.keep(*given)

    def moved_on(self, scheduled: Sequence[ScheduledSequence]) -> Any:
        found = self.continued.moved_on(scheduled)
        if found is None:
            return None
        self.moved += 1
        step = self.runner.gather(list(scheduled))
        ready = self.runner.prepare(step)
        assert found[0].order == step.order
        assert found[0].variants == step.variants
        a, b = found[1].batch.attention, ready.batch.attention
        assert a is not None
        assert b is not None
        assert (a.seq_lens, a.query_start_loc) == (b.seq_lens, b.query_start_loc)
        width = b.block_table.shape[1]  # what is kept may be wider: one of its sequences was longer once
        pairs = [
            (found[1].input_ids, ready.input_ids), (found[1].positions, ready.positions),
            (found[1].sampled_rows, ready.sampled_rows), (a.slot_mapping, b.slot_mapping),
            (a.token_sequence, b.token_sequence), (a.token_visible, b.token_visible),
            (a.block_table[:, :width], b.block_table),
            (found[1].batch.tokens.token_variant, ready.batch.tokens.token_variant),
        ]  # fmt: skip
        assert all(torch.equal(mine, fresh) for mine, fresh in pairs)
        return found


@pytest.mark.parametrize(
    ("options", "slots"),
    [({}, None), ({"num_kv_blocks": 14, "max_model_len": 48}, None), ({}, 1)],
    ids=["blocks grow", "sequences give way", "variants come into slots"],
)
def test_steps_that_are_moved_on(options: dict[str, Any], slots: int | None, tmp_path: Path) -> None:
    paths = make_family("mixtral", tmp_path / "checkpoints")
    make_plan(paths, "separate", None, tmp_path / "bundle")
    engine = EngineCore(engine_config(tmp_path / "bundle", **{"max_model_len": 64, "slots": slots} | options))
    assert engine.runner._continued is not None
    compared = engine.runner._continued = Compared(engine.runner, engine.runner._continued)  # type: ignore[assignment]
    found: dict[str, list[int]] = {}
    for step in range(200):
        if step % 9 == 0 and step < 40:
            prompt = [3 + (5 * step + i) % 90 for i in range(1 + step % 13)]
            sampling = TokenSampling(max_tokens=30, temperature=0.0)
            name = SequenceId(f"r{step}", 0)
            engine.add_request(
                EngineRequest(request_id=name, variant=step % 3, prompt_token_ids=prompt, sampling=sampling)
            )
        for output in engine.step():
            found.setdefault(str(output.request_id), []).extend(output.new_token_ids)
    assert not engine.has_work()
    assert [len(tokens) for tokens in found.values()] == [30] * 5
    assert compared.moved > 40
    assert compared.made > 4
    engine.check_integrity()
