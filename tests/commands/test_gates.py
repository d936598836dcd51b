"""Gates compared offline: answers known in closed form, and whatever is wrong with the input."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_megatron.__main__ import main
from sapo_megatron.commands.gates import compare_gates
from sapo_megatron.commands.gates.compare import compare, small_variance_tau, suggest_tau
from sapo_megatron.commands.gates.gate import Gate, default_gates, parse_gate
from sapo_megatron.commands.gates.show import as_json, as_text
from sapo_megatron.errors import UserError
from sapo_megatron.objective.sapo import sapo_weight
from sapo_megatron.runs.dump import UNKNOWN, DumpInfo, DumpRows, read_dumps, write_dump
from tests.support.tiny import ROOT, cli

INFO = DumpInfo(
    step=10,
    update=3,
    loss_type="sapo",
    tau_pos=2.0,
    tau_neg=3.0,
    loss_agg_mode="seq-mean-token-mean",
)
SAPO, GRPO = Gate("sapo", 1.0, 1.05), Gate("grpo", 0.2, 0.28)
GSPO, CISPO = Gate("gspo", 3e-4, 4e-4), Gate("cispo", 1.0, 0.28)
VESPO = Gate("vespo")
ALL = [SAPO, GRPO, GSPO, CISPO, VESPO]


def tokens(ratios, advantages, sequences=None, layers_changed=None):
    """Rows with these ratios; each token a sequence of its own unless ``sequences`` says."""
    n = len(ratios)
    log_ratio = torch.tensor(ratios, dtype=torch.float64).log()
    return DumpRows(
        sequence=torch.tensor(range(n) if sequences is None else sequences),
        position=torch.arange(n),
        old_logprob=torch.zeros(n),
        logprob=log_ratio,
        advantage=torch.tensor(advantages, dtype=torch.float32),
        mask=torch.ones(n, dtype=torch.bool),
        layers_changed=torch.tensor([UNKNOWN] * n if layers_changed is None else layers_changed),
    )


@pytest.fixture
def dump(tmp_path):
    """Write rows and read them back."""

    def dump(*args, info=INFO, **kwargs):
        write_dump(tmp_path / "dumps" / "one.parquet", tokens(*args, **kwargs), info)
        return read_dumps([tmp_path / "dumps"])

    return dump


def random_rows(n=120, seed=0):
    """Sequences of 10 tokens, some of them masked, a few without an advantage."""
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(n // 10, generator=generator)
    advantages[0] = 0
    return DumpRows(
        sequence=torch.arange(n) // 10,
        position=torch.arange(n) % 10,
        old_logprob=-torch.rand(n, generator=generator),
        logprob=-torch.rand(n, generator=generator),
        advantage=advantages.repeat_interleave(10),
        mask=torch.rand(n, generator=generator) < 0.8,
        layers_changed=torch.randint(0, 7, (n,), generator=generator),
    )


def weights(comparison):
    return [effect.weights.tolist() for effect in comparison.effects]


# What comes out


def test_sapo_weights_are_those_of_the_paper(dump):
    held = dump([2, 2, 2.7627, 2.6788, 1], [1, -1, 0.5, -3, 1])
    (got,) = weights(compare(held, [SAPO], 0.9))
    assert got == pytest.approx([0.7864, 0.7681, 0.5, 0.5, 1], abs=1e-4)


def test_on_policy_all_gates_are_the_policy_gradient(dump):
    comparison = compare(dump([1.0] * 4, [1, -1, 2, -0.5], [0, 1, 0, 2]), ALL, 0.9)
    for effect in comparison.effects:
        assert effect.weights.tolist() == [1] * 4
        assert dataclasses.astuple(effect.weight) == (1, 1, 1)
        assert dataclasses.astuple(effect.mass_kept) == (1, 1, 1)
        assert effect.ess == 1
    assert torch.allclose(comparison.cosine, torch.ones(5, 5, dtype=torch.float64), atol=1e-12)
    assert comparison.log_ratio_var.all == 0
    assert dataclasses.astuple(comparison.suggestion) == (0.9, None, None, None, None)


def test_a_clip_silences_one_side_for_each_sign(dump):
    ratios, up, down = [0.7, 1.0, 1.4], [1] * 3, [-1] * 3
    comparison = compare(dump(ratios * 2, up + down), [GRPO], 0.9)
    assert weights(comparison) == [[1, 1, 0, 0, 1, 1]]
    (effect,) = comparison.effects
    assert dataclasses.astuple(effect.weight) == pytest.approx((4 / 6, 2 / 3, 2 / 3))
    kept = (4.1 / 6.2, 1.7 / 3.1, 2.4 / 3.1)  # sum of r that stays
    assert dataclasses.astuple(effect.mass_kept) == pytest.approx(kept, rel=1e-6)
    left = [0.7, 1.0, 1.0, 1.4]
    assert effect.ess == pytest.approx(sum(left) ** 2 / 6 / sum(r * r for r in left), rel=1e-6)


def test_cispo_bounds_the_factor_and_silences_nobody(dump):
    comparison = compare(dump([0.5, 2.0, 2.0], [1, 1, -1]), [CISPO], 0.9)
    assert weights(comparison) == [pytest.approx([1, 0.64, 0.64], rel=1e-6)]


def test_gspo_gives_a_sequence_one_ratio(dump):
    # Geometric means 1 (inside the clip range) and 1.2 (outside it for A > 0 only).
    ratios = [0.5, 2.0, 1.2, 1.2, 1.2, 1.2]
    comparison = compare(dump(ratios, [1, 1, 1, 1, -1, -1], [0, 0, 1, 1, 2, 2]), [GSPO], 0.9)
    assert weights(comparison) == [pytest.approx([2, 0.5, 0, 0, 1, 1], rel=1e-6)]
    # w r of a sequence's tokens is the sequence's ratio: 1, 0, 1.2, two tokens each.
    assert comparison.effects[0].ess == pytest.approx(2.2**2 / 3 / (1 + 1.44), rel=1e-6)


def test_vespo_weighs_a_sequence_by_its_product(dump):
    ratios = [0.5, 2.0, 1.2, 1.2, 1.2, 1.2]  # products 1, 1.44 and 1.44
    comparison = compare(dump(ratios, [1, 1, 1, 1, -1, -1], [0, 0, 1, 1, 2, 2]), [VESPO], 0.9)
    pos, neg = 1.44**2 * math.exp(3 * -0.44) / 1.2, 1.44**3 * math.exp(2 * -0.44) / 1.2
    assert weights(comparison) == [pytest.approx([2, 0.5, pos, pos, neg, neg], rel=1e-6)]


def test_mass_counts_sequences_not_tokens(dump):
    # A sequence of one token that is clipped, and one of three that are not.
    held = [2.0, 1, 1, 1], [1] * 4, [0, 1, 1, 1]
    (effect,) = compare(dump(*held), [GRPO], 0.9).effects
    assert effect.mass_kept.pos == pytest.approx(1 / 3)  # 1 of 2 + 1
    assert effect.weight.pos == pytest.approx(3 / 4)
    by_token = dataclasses.replace(INFO, loss_agg_mode="token-mean")
    (effect,) = compare(dump(*held, info=by_token), [GRPO], 0.9).effects
    assert effect.mass_kept.pos == pytest.approx(3 / 5)


def test_cosine(dump):
    # Gradients w r A in units of a token: policy gradient (1, 2); grpo drops the second.
    comparison = compare(dump([1.0, 2.0], [1, 1]), [Gate("grpo", 0.9, 9.0), GRPO], 0.9)
    assert comparison.cosine[0, 1].item() == pytest.approx(1 / math.sqrt(5), rel=1e-6)
    assert comparison.cosine.diag().tolist() == pytest.approx([1, 1])


def test_a_gate_without_gradient_has_no_direction(dump):
    comparison = compare(dump([2.0, 3.0], [1, 1]), [GRPO, SAPO], 0.9)
    assert comparison.cosine[0, 1].isnan()
    shown = json.loads(as_json(comparison))
    assert shown["cosine"][0] == [None, None]
    assert shown["gates"][0]["ess"] in (None, 0)
    assert shown["gates"][0]["weight"]["neg"] is None


def test_ratios_beyond_all_reason_give_numbers(dump):
    comparison = compare(dump([1e30, 1e-30, 1e30, 1e-30], [1, 1, -1, -1]), ALL, 0.9)
    for effect in comparison.effects:
        assert effect.weights.isfinite().all()
    assert comparison.effects[0].weights.tolist() == [0] * 4  # the clamp of the log-ratio


def test_tokens_without_advantage_have_no_weight(dump):
    comparison = compare(dump([2.0, 2.0], [0, 1]), [SAPO], 0.9)
    assert comparison.effects[0].weights[0].isnan()
    assert comparison.effects[0].weight.all == comparison.effects[0].weight.pos
    assert "50.0% with A = 0" in as_text(comparison)


def test_buckets_of_layers(dump):
    changed = [0, 0, 1, 2, 3, 4, 5, -1]
    ratios = [1, 2, 2, 2, 2, 2, 2, 9]
    comparison = compare(dump(ratios, [1] * 8, layers_changed=changed), [SAPO, GRPO], 0.9)
    assert [(b.low, b.high, b.tokens) for b in comparison.buckets] == [
        (0, 0, 2),
        (1, 1, 1),
        (2, 2, 1),
        (3, 4, 2),
        (5, 8, 1),
    ]
    first, second = comparison.buckets[:2]
    assert first.weight == pytest.approx(((1 + 0.7864) / 2, 0.5), abs=1e-4)
    assert second.weight == pytest.approx((0.7864, 0), abs=1e-4)
    assert first.log_ratio_var == pytest.approx((math.log(2) / 2) ** 2, rel=1e-6)
    assert second.log_ratio_var == 0
    assert "3 to 4" in as_text(comparison)
    assert compare(dump([1.0], [1]), [SAPO], 0.9).buckets == ()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=120, max_size=120), st.integers(0, 9))
def test_context_parallel_pieces_are_the_whole(tmp_path_factory, owners, seed):
    folder, rows = tmp_path_factory.mktemp("dumps"), random_rows(seed=seed)
    write_dump(folder / "whole.parquet", rows, INFO)
    for rank in range(3):
        mine = torch.tensor([owner == rank for owner in owners])
        columns = {f.name: getattr(rows, f.name)[mine] for f in dataclasses.fields(rows)}
        write_dump(folder / "pieces" / f"{rank}.parquet", DumpRows(**columns), INFO)
    one, other = (
        json.loads(as_json(compare(read_dumps([path]), ALL, 0.9)))
        for path in (folder / "whole.parquet", folder / "pieces")
    )
    assert close(one, other | {"files": 1})


def close(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return one == (pytest.approx(other, rel=1e-9, abs=1e-12) if isinstance(one, float) else other)


# Temperatures

OFF_POLICY = st.lists(st.floats(0.1, 0.9) | st.floats(1.1, 2), min_size=1, max_size=50)


@settings(deadline=None)
@given(OFF_POLICY, st.floats(0.2, 5))
def test_a_suggestion_recovers_the_temperature(ratios, tau):
    ratio = torch.tensor(ratios, dtype=torch.float64)
    assert suggest_tau(ratio, sapo_weight(ratio, tau).mean().item()) == pytest.approx(tau, rel=1e-6)


@settings(deadline=None)
@given(OFF_POLICY, st.floats(0.01, 0.99))
def test_a_suggestion_attenuates_as_wanted(ratios, attenuation):
    ratio = torch.tensor(ratios, dtype=torch.float64)
    found = suggest_tau(ratio, attenuation)
    assert sapo_weight(ratio, found).mean().item() == pytest.approx(attenuation, rel=1e-6)


def test_a_suggestion_where_half_the_ratios_are_one():
    ratio = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert suggest_tau(ratio, 0.4) is None
    assert suggest_tau(ratio, 0.5 + 0.7864 / 2) == pytest.approx(1.0, abs=1e-3)
    assert suggest_tau(ratio[:0], 0.5) is None


def test_the_estimate_meets_the_exact_answer_where_the_variance_is_small():
    log_ratio = 0.01 * torch.randn(20000, generator=torch.Generator().manual_seed(0)).double()
    estimate = small_variance_tau(log_ratio.var(correction=0).item(), 0.999)
    assert suggest_tau(log_ratio.exp(), 0.999) == pytest.approx(estimate, rel=0.01)
    assert estimate == pytest.approx(2 * math.sqrt(0.001 / 1e-4), rel=0.02)
    assert small_variance_tau(0.0, 0.9) is None
    assert small_variance_tau(math.nan, 0.9) is None


def test_suggestions_are_by_sign(dump):
    comparison = compare(dump([2.0, 1.5], [1, -1]), [SAPO], 0.7864)
    assert comparison.suggestion.tau_pos == pytest.approx(1.0, abs=1e-3)
    assert comparison.suggestion.tau_neg == pytest.approx(2.0, abs=1e-3)


# Gates by name


@pytest.mark.parametrize("gate", [*ALL, Gate("sapo", 0.123456789, 1e-9)])
def test_a_gate_is_parsed_as_it_is_shown(gate):
    assert parse_gate(str(gate)) == gate


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sapo",
        "sapo:",
        "sapo:1",
        "sapo:1,",
        "sapo:1,2,3",
        "sapo:0,1",
        "sapo:1,-1",
        "sapo:nan,1",
        "grpo:0.2,inf",
        "gspo:a,b",
        "vespo:2,3",
        "ppo:1,1",
        "SAPO:1,1",
    ],
)
def test_a_gate_that_is_none(text):
    with pytest.raises(UserError) as error:
        parse_gate(text)
    forms = {"grpo": "grpo:CLIP_LOW", "gspo": "gspo:CLIP_LOW", "vesp": "vespo, which has no values"}
    form = forms.get(text[:4], "sapo:TAU_POS")
    for expected in (f"--gate: expected {form}", repr(text)):
        assert expected in str(error.value)


def test_the_default_gates_have_the_temperatures_of_the_run():
    assert default_gates(INFO)[:5] == [Gate("sapo", 2.0, 3.0), GRPO, GSPO, CISPO, VESPO]


# The command


@pytest.fixture
def work(tmp_path, monkeypatch):
    write_dump(tmp_path / "dumps" / "one.parquet", random_rows(), INFO)
    (tmp_path / "empty").mkdir()
    zeros = dataclasses.replace(random_rows(), advantage=torch.zeros(120))
    write_dump(tmp_path / "zeros.parquet", zeros, INFO)
    unknown = dataclasses.replace(INFO, loss_agg_mode="median")
    write_dump(tmp_path / "median.parquet", random_rows(), unknown)
    (tmp_path / "text.parquet").write_text("text")
    monkeypatch.chdir(tmp_path)
    # What main does for a program would take pytest's own handlers away.
    monkeypatch.setattr("sapo_megatron.__main__._set_up_logging", lambda debug: None)
    return tmp_path


def test_the_command(work):
    words = ["--gate", "sapo:1,1.05", "--gate", "sapo:1,1.05", "--gate", "gspo:3e-4,4e-4"]
    done = cli("gates", "dumps", *words, "--json", "x.json", "--out", "new/out", cwd=work)
    assert done.returncode == 0, done.stderr
    assert (work / "new" / "out" / "gates.png").read_bytes().startswith(b"\x89PNG")
    shown = json.loads((work / "x.json").read_text())
    assert [gate["gate"] for gate in shown["gates"]] == [
        "sapo:1,1.05",
        "sapo:1,1.05",
        "gspo:0.0003,0.0004",
    ]
    assert shown["cosine"][0][1] == pytest.approx(1)
    assert shown["mini_batches"] == [{"step": 10, "update": 3}]
    assert shown["suggestion"]["attenuation"] == 0.95
    assert "tau for a mean weight of 0.95" in done.stdout
    assert all(line == line.rstrip() and len(line) <= 100 for line in done.stdout.splitlines())


def test_the_command_alone_takes_the_usual_gates_and_writes_nothing(work):
    before = sorted(work.rglob("*"))
    text = compare_gates(["dumps"], [], 0.9, None, None)
    for gate in default_gates(INFO):
        assert str(gate) in text
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize("ratio", [1.0, 1.001, 50.0])
@pytest.mark.parametrize(
    "gates", [["gspo:0.1,0.1"], [f"sapo:{tau},1" for tau in range(1, 8)]], ids=["dots", "colours"]
)
def test_a_picture_of_any_dump(dump, tmp_path, ratio, gates):
    dump([ratio] * 3, [1, 1, 0.5])
    compare_gates([str(tmp_path / "dumps")], gates, 0.9, None, str(tmp_path))
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["DUMP", "sapo-megatron gates --help"]),
        (["missing"], ["missing", "nothing there"]),
        (["empty"], ["empty", "*.parquet"]),
        (["text.parquet"], ["text.parquet", "parquet file"]),
        (["zeros.parquet"], ["advantage", "got 0 for all", "another step"]),
        (["median.parquet"], ["loss_agg_mode", "'median'"]),
        (["dumps", "dumps/../zeros.parquet"], ["each valid token once"]),
        (["dumps", "--gate"], ["--gate", "expected one argument"]),
        (["dumps", "--gate", "ppo:1,2"], ["sapo:TAU_POS,TAU_NEG or grpo:CLIP_LOW", "'ppo:1,2'"]),
        (["dumps", "--gate", "sapo:0,1"], ["sapo:TAU_POS,TAU_NEG", "> 0", "'sapo:0,1'"]),
        (["dumps", "--gate", "grpo:0.2"], ["grpo:CLIP_LOW,CLIP_HIGH", "grpo:0.2,0.28"]),
        (["dumps", "--attenuation", "x"], ["--attenuation", "'x'"]),
        (["dumps", "--attenuation", "1"], ["--attenuation", "between 0 and 1"]),
        (["dumps", "--attenuation", "nan"], ["--attenuation", "nan"]),
        (["dumps", "--json", "no/x.json"], ["--json", "no/x.json"]),
        (["dumps", "--json", "dumps"], ["--json", "dumps"]),
        (["dumps", "--out", "text.parquet"], ["--out", "text.parquet"]),
        (["dumps", "--out", "text.parquet/x"], ["--out", "text.parquet"]),
        (["dumps", "--tau", "1"], ["gates", "--tau 1"]),
    ],
    ids=" ".join,
)
def test_wrong_words(work, capsys, words, expected):
    before = sorted(work.rglob("*"))
    assert main(["gates", *words]) == 2
    done = capsys.readouterr()
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    for text in expected:
        assert text in line
    assert sorted(work.rglob("*")) == before


def test_the_manual_shows_what_comes_out(tmp_path, monkeypatch):
    manual = (ROOT / "docs" / "gates.md").read_text()
    program = manual.split("```python\n")[1].split("```")[0]
    shown = manual.split("```text\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert compare_gates(["dumps"], [], 0.95, None, None) == shown
