"""What holds for every update, whatever the policy, the batch, the mask, the rewards' scale and the settings.

``GUARANTEE_UPDATES`` is the number of updates that are tried, 60 if it is not set. Ten thousand, with a summary::

    GUARANTEE_UPDATES=10000 python -m pytest -s tests/numerics/test_guarantees.py
    python -m tests.numerics.test_guarantees 10000

KL and surrogate are computed again in float64, from the parameters before and after the update, by the formulas of
``tests.cases``. What they may differ by is the rounding of the library's own computation: a first-order bound that is
computed along with them, from the policy at hand.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from copy import deepcopy
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from tensordict.nn import set_composite_lp_aggregate
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MultiAgentMLP

from tests.cases import (
    ACTION,
    DISTRIBUTIONS,
    GROUP,
    LOG_PROB,
    NVEC,
    OBSERVATION,
    OLD_DATA,
    PARTS,
    collected_log_prob,
    joint_log_prob,
    make_data,
    make_loss,
    make_policy,
    textbook_kl,
)
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.distributions.divergence import entropy
from torchrl_trpo.objectives import HATRPOSequentialObjective
from torchrl_trpo.objectives.policy_network import distribution_keys, input_keys

UPDATES = int(os.environ.get("GUARANTEE_UPDATES", "60"))
UPDATES_PER_EXAMPLE = 3
"""On the same batch: from the second on, the policy is not the one that collected it."""
LAYOUTS = ["shared", "per_agent", "sequential"]
N_ACT, N_OBS = 2, 3
SIZES = {"normal": 2 * N_ACT, "tanh_normal": 2 * N_ACT, "composite": 2 * N_ACT + 3}
UNVALIDATED = {"normal", "categorical"}
"""Kinds whose distributions can be told not to raise for a NaN of their own accord."""

set_hypothesis_home_dir(os.path.join(tempfile.gettempdir(), "torchrl_trpo_hypothesis"))  # nothing in the repository


@dataclass(frozen=True)
class Case:
    """A policy, a batch, an objective and settings."""

    seed: int
    kind: str
    n_agents: int
    hidden: list[int]
    sharpness: float
    batch: tuple[int, ...]
    dtype: torch.dtype
    tail: str
    scale: float
    zeros: float
    mask: str
    bad: tuple[str, float] | None
    pieces: int | None
    entropy_coeff: float
    cap: float | None
    updater: dict[str, float | str]
    agent_order: str


def log_uniform(low, high):
    return st.floats(math.log10(low), math.log10(high)).map(lambda x: min(max(10**x, low), high))


CASES = st.builds(
    Case,
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(list(DISTRIBUTIONS)),
    n_agents=st.integers(1, 5),
    hidden=st.lists(st.integers(1, 8), max_size=2),
    sharpness=log_uniform(0.1, 30.0),
    batch=st.sampled_from([(1,), (1, 1), (2,), (7,), (3, 4), (24,), (2, 3, 4), (60,)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    tail=st.sampled_from(["normal", "heavy", "equal"]),
    scale=log_uniform(1e-8, 1e8),
    zeros=st.sampled_from([0.0, 0.0, 0.0, 0.5, 0.5, 0.95, 0.95, 1.0]),
    mask=st.sampled_from(["none", "none", "none", "half", "half", "one agent", "one agent", "nearly all", "all"]),
    bad=st.sampled_from([
        *[None] * 30,
        *[("advantage", value) for value in (math.nan, math.inf, -math.inf)],
        *[("log_prob", value) for value in (math.nan, math.inf, -math.inf)],
        *[("observation", value) for value in (math.nan, math.inf)],
        ("action", math.nan),
    ]),
    pieces=st.sampled_from([None, None, None, 1, 2, 3]),
    entropy_coeff=st.sampled_from([0.0, 0.0, 0.01, 1.0]),
    cap=st.sampled_from([None, None, None, 1.05]),
    updater=st.fixed_dictionaries({
        "max_kl": log_uniform(1e-5, 0.5),
        "damping": st.sampled_from([0.0, 1e-8, 1e-3, 0.1, 10.0]),
        "cg_iters": st.integers(1, 20),
        "cg_tol": st.sampled_from([0.0, 1e-6, 1e-2]),
        "backtrack_coeff": st.floats(0.05, 0.95),
        "max_backtracks": st.sampled_from([0, 1, 3, 10, 10, 15]),
        "accept_ratio": st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.5, 0.99]),
        "fisher_subsample": st.sampled_from([1.0, 1.0, 0.5, 0.1, 0.001]),
        "kl_budget": st.sampled_from(["agent", "agent", "team"]),
    }),
    agent_order=st.sampled_from(["random", "random", "greedy"]),
)


@dataclass
class Record:
    """What was tried, and how close it came to the radius."""

    updates: int = 0
    accepted: int = 0
    rejected: int = 0
    worst: dict[str, float] = field(default_factory=dict)

    def see(self, name, value):
        self.worst[name] = max(self.worst.get(name, -math.inf), float(value))

    def __str__(self):
        worst = "\n".join(f"  {name}: {value:.9g}" for name, value in sorted(self.worst.items()))
        return f"{self.updates} updates: {self.accepted} regions accepted, {self.rejected} rejected\n{worst}"


RECORD = Record()


def make_case_policy(case, layout):
    """The policy; its sharpness runs from almost uniform to almost deterministic."""
    net = MultiAgentMLP(
        N_OBS,
        sum(NVEC) if "multi" in case.kind else SIZES.get(case.kind, N_ACT + 2),
        n_agents=case.n_agents,
        centralized=False,
        share_params=layout == "shared",
        num_cells=case.hidden,
        depth=len(case.hidden),
    ).to(case.dtype)
    for parameter in net.parameters():
        parameter.data.mul_(case.sharpness)
    return make_policy(net, case.kind, N_ACT, **({} if is_validated(case) else {"validate_args": False}))


def bad_key(case):
    """Which entry is broken; distributions that check what they are given refuse broken observations and actions."""
    if case.bad is None or case.bad[0] in {"advantage", "log_prob"} or case.kind in UNVALIDATED:
        return case.bad and case.bad[0]
    return "advantage"


def is_validated(case):
    return bad_key(case) not in {"observation", "action"}


def cast(data, dtype):
    return data.apply(lambda value: value.to(dtype) if value.is_floating_point() else value)


def make_case_data(case, actor):
    """The batch as it should be, as it is with a broken entry, and which ``(row, agent)`` is broken."""
    clean = cast(make_data(deepcopy(actor).double(), case.batch, case.n_agents, N_OBS), case.dtype)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        actor(clean)  # once more, in the policy's own type
    shape = (*case.batch, case.n_agents, 1)
    advantage = torch.randn(shape, dtype=case.dtype)
    if case.tail == "heavy":
        advantage = advantage / torch.rand(shape, dtype=case.dtype).clamp_min(1e-3)
    if case.tail == "equal":
        advantage = advantage.flatten()[0].expand(shape)
    clean["advantage"] = case.scale * torch.where(torch.rand(shape) < case.zeros, 0.0, advantage)
    if case.mask != "none":
        keep = {"half": 0.5, "nearly all": 0.05, "all": 0.0, "one agent": 0.9}[case.mask]
        clean["mask"] = torch.rand(shape) < keep
        if case.mask == "one agent":
            clean["mask"][..., torch.randint(case.n_agents, ()), :] = False
    key, data = bad_key(case), clean.clone()
    if key is None:
        return clean, data, None
    row, agent = (int(torch.randint(size, ())) for size in (math.prod(case.batch), case.n_agents))
    first_part = (GROUP, f"{next(iter(PARTS))}_log_prob")
    log_prob = LOG_PROB if LOG_PROB in data.keys(True) else first_part
    entry = data[{"advantage": "advantage", "log_prob": log_prob, "observation": OBSERVATION, "action": ACTION}[key]]
    if not entry.is_floating_point():  # a discrete action
        entry = data["advantage"]
    entry.view(-1, *entry.shape[len(case.batch) :])[row, agent] = case.bad[1]
    return clean, data, (row, agent)


class Truth:
    """A policy at a batch in float64, and a bound of what rounding in ``dtype`` can do to its outputs."""

    def __init__(self, actor, data, dtype):
        policy = deepcopy(actor).double()
        # What the library computes in dtype is compared with float64, which has roundings of its own: hence twice.
        self.eps = 2 * torch.finfo(dtype).eps
        self.data = cast(data, torch.float64)
        if "tanh" in str(policy[-1].distribution_class).lower():
            limit = torch.tensor(1 - torch.finfo(dtype).resolution, dtype=dtype).double()
            self.data[ACTION] = self.data[ACTION].clamp(-limit, limit)  # TorchRL's, which depends on the type
        with torch.no_grad():
            parameters = policy.get_dist_params(self.data.select(*input_keys(policy)))
        parameters = parameters.select(*distribution_keys(policy)).detach()
        entries = {key: v for key, v in parameters.items(True, True) if v.is_floating_point()}
        self.leaves = [value.requires_grad_() for value in entries.values()]
        self.dist = policy.build_dist_from_params(parameters)
        # A sum of k products is off by at most k·eps times the sum of their sizes (Higham 2002, section 3.1); tanh and
        # softplus do not enlarge errors. So the outputs are off by at most eps·Σ(k + 4) times those of the network
        # with the absolute values of weights and inputs, and without activations.
        size, terms = self.data[OBSERVATION].abs(), 0
        weights = dict(sorted((name, p.detach().abs()) for name, p in policy.named_parameters()))
        for name, weight in weights.items():
            if name.endswith("weight"):
                size = (weight @ size.unsqueeze(-1)).squeeze(-1) + weights[name.removesuffix("weight") + "bias"]
                terms += weight.shape[-1] + 4
        self.size = size.amax(-1) + 1  # [*B, n_agents]
        self.error = self.eps * terms * self.size
        scales = [value.detach() for key, value in entries.items() if key[-1] == "scale"]
        curvatures = [(2 / scale**2).sum(-1) for scale in scales]
        self.curvature = sum(curvatures, torch.ones_like(self.size))  # of the KL, at its largest
        self.log_prob = joint_log_prob(self.dist, self.data)
        slope = self.slope(self.log_prob)
        # The terms of a log-probability: parameters times slopes, what is normalised, and 8 a dimension for the tanh.
        inside = slope * self.size + self.log_prob.abs() + collected_log_prob(self.data).abs() + self.size + 32
        self.log_prob_error = (slope * self.error + 16 * self.eps * inside).detach()
        self.log_prob = self.log_prob.detach()

    def slope(self, values):
        """How much values ``[*B, n_agents]`` change with the distribution's parameters."""
        slopes = torch.autograd.grad(values.sum(), self.leaves, retain_graph=True, materialize_grads=True)
        return sum(slope.nan_to_num().abs().sum(-1) for slope in slopes)

    def entropy(self):
        """The entropies and their rounding errors, each ``[*B, n_agents]``."""
        values = entropy(self.dist, self.size.ndim)
        error = self.slope(values) * self.error + 16 * self.eps * (values.abs() + self.size + 8)
        return values.detach(), error.detach()


def true_kl(old, new):
    """The KL divergences and their rounding errors, each ``[*B, n_agents]``."""
    kl = textbook_kl(old.dist, new.dist)
    error = old.slope(kl) * old.error + new.slope(kl) * new.error
    error = error + 2 * torch.maximum(old.curvature, new.curvature) * (old.error + new.error) ** 2
    # The logarithms of probabilities (or scales) are rounded each on its own, and cancel.
    error = error + 16 * old.eps * (8 + old.size + new.size + 5 * kl)
    return kl.detach(), error.detach()


def true_gains(old, new, loss, factor, factor_error):
    """What each row adds to the surrogate's improvement, and the rounding error, each ``[*B, n_agents]``."""
    advantage, collected = old.data["advantage"].squeeze(-1), collected_log_prob(old.data)
    cap = loss.max_importance_ratio  # a float32 buffer, and so is its logarithm, which is what is used
    cap = math.inf if cap is None else cap.log().double().exp()
    new_ratio, old_ratio = ((truth.log_prob - collected).exp().clamp_max(cap) for truth in (new, old))
    gain = factor * advantage * (new_ratio - old_ratio)
    error = new_ratio * new.log_prob_error.expm1() + old_ratio * old.log_prob_error.expm1()
    error = error + (new_ratio - old_ratio).abs() * factor_error.expm1() + 4 * old.eps * (new_ratio + old_ratio)
    error = (factor * advantage.abs() * error).nan_to_num(math.inf)  # the bound of a ratio may be beyond all range
    if loss.entropy_coeff:
        (new_entropy, new_error), (old_entropy, old_error) = new.entropy(), old.entropy()
        gain = gain + loss.entropy_coeff.double() * (new_entropy - old_entropy)
        error = error + loss.entropy_coeff.double() * (new_error + old_error)
    return gain, error, new_ratio


def to_the_bit(new, old):
    """Whether two tensors are the same, NaNs and signs of zeros included."""
    as_bytes = (value.detach().contiguous().view(torch.uint8) if value.ndim else value.detach() for value in (new, old))
    return new.dtype == old.dtype and new.shape == old.shape and torch.equal(*as_bytes)


def same_tensordict(new, old):
    keys = set(new.keys(True, True))
    return keys == set(old.keys(True, True)) and all(to_the_bit(new[key], old[key]) for key in keys)


def with_rubbish_where_masked(data):
    """The batch with other observations, advantages and log-probabilities where they do not count."""
    other = data.clone()
    if "mask" in data.keys():
        keep = data["mask"].squeeze(-1)
        other["advantage"][~keep] = math.nan
        other[OBSERVATION][~keep] = 1e30
        if LOG_PROB in data.keys(True):
            other[LOG_PROB][~keep] = -math.inf
    return other


def check_update(case, layout, objective, loss, actor, clean, data, broken, seed):
    updater = TrustRegionUpdater(objective, **case.updater)
    twin = TrustRegionUpdater(deepcopy(objective), **case.updater)
    old, batch = deepcopy(actor), data.clone()
    torch.manual_seed(seed)
    stats = updater.step(data)
    torch.manual_seed(seed)
    again = twin.step(with_rubbish_where_masked(data))

    assert same_tensordict(stats, again), "the same input and seed give the same statistics, whatever is masked"
    pairs = list(zip(objective.parameters(), twin.objective.parameters(), strict=True))
    assert all(to_the_bit(*pair) for pair in pairs), "and the same parameters"
    assert same_tensordict(data, batch), "the batch is not modified"
    assert all(parameter.isfinite().all() for parameter in actor.parameters()), "what is written is finite"

    accepted, max_kl = stats["accepted"], stats["max_kl"]
    n_regions = 1 if layout == "shared" else case.n_agents
    assert accepted.shape == (n_regions,)
    for name in ("kl", "improvement", "step_fraction"):
        assert stats[name].isfinite().all()
        assert (stats[name] >= 0).all()
        assert (stats[name][~accepted] == 0).all()
    assert (stats["kl"] <= max_kl).all()
    budget = n_regions * case.updater["max_kl"]
    rounding = 4 * n_regions * torch.finfo(case.dtype).eps * budget
    RECORD.see("sum of KL / budget of the team", stats["kl"].sum() / budget)
    assert stats["kl"].sum() <= budget + rounding
    is_team = case.updater["kl_budget"] == "team"
    hands_on = is_team and getattr(objective, "agent_order", None) == "greedy"  # what is left of the budget
    assert hands_on or abs(float(max_kl.sum()) - budget) <= rounding
    assert is_team or (max_kl == max_kl[0]).all()
    predicted = case.updater["accept_ratio"] * stats["step_fraction"] * stats["expected_improvement"]
    near = 1 - 4 * torch.finfo(case.dtype).eps  # the order of the factors
    assert (stats["improvement"] >= near * predicted)[accepted].all()
    for parameter, before in zip(actor.parameters(), old.parameters(), strict=True):
        assert layout == "shared" or parameter.shape[0] == n_regions
        rows = [(parameter, before)] if layout == "shared" else list(zip(parameter, before, strict=True))
        for region, row in enumerate(rows):
            assert accepted[region] or to_the_bit(*row), "a rejected region keeps its parameters"
    mask = clean["mask"] if "mask" in clean.keys() else torch.ones_like(clean["advantage"], dtype=torch.bool)
    mask = mask.squeeze(-1)
    if broken is not None and mask.flatten(0, -2)[broken]:
        assert not accepted[0 if layout == "shared" else broken[1]], "a region with anything not finite is rejected"

    RECORD.updates += 1
    RECORD.accepted += int(accepted.sum())
    RECORD.rejected += int((~accepted).sum())
    if accepted.any():
        check_truth(case, layout, loss, stats, Truth(old, clean, case.dtype), Truth(actor, clean, case.dtype), mask)
    for parameter in loss.parameters():
        parameter.grad = None


def check_truth(case, layout, loss, stats, old, new, mask):
    """KL and surrogate, computed again."""
    weight = mask.double() / (mask.sum() if layout == "shared" else mask.flatten(0, -2).sum(0)).clamp_min(1)
    rows = weight.numel()

    def mean(values):
        values = torch.where(mask, weight * values, 0.0)
        return values.sum().reshape(1) if layout == "shared" else values.flatten(0, -2).sum(0)

    accepted, name = stats["accepted"], str(case.dtype).removeprefix("torch.")
    kl, kl_error = true_kl(old, new)
    kl, kl_error = mean(kl), mean(kl_error) + (rows + 4) * old.eps * mean(kl)
    factor, factor_error = torch.ones_like(old.log_prob[..., :1]), torch.zeros_like(old.log_prob[..., :1])
    gain, gain_error = torch.zeros_like(kl), torch.zeros_like(kl)
    for agents in [slice(None)] if layout != "sequential" else [slice(m, m + 1) for m in stats["order"].tolist()]:
        values, errors, ratio = true_gains(old, new, loss, factor, factor_error)
        errors = mean(errors) + (rows + 8) * old.eps * mean(values.abs())
        gain[agents], gain_error[agents] = mean(values)[agents], errors[agents]
        if layout == "sequential":
            moved = mask[..., agents] & accepted[agents]
            factor = factor * torch.where(moved, ratio[..., agents], 1.0)
            factor_error = factor_error + torch.where(moved, new.log_prob_error[..., agents], 0.0) + 2 * old.eps
    for region in accepted.nonzero().flatten():
        reported, max_kl = stats["kl"][region].double(), stats["max_kl"][region].double()
        assert kl[region] <= max_kl + kl_error[region]
        assert (kl[region] - reported).abs() <= kl_error[region]
        assert gain[region] >= -gain_error[region]
        assert (gain[region] - stats["improvement"][region].double()).abs() <= gain_error[region]
        RECORD.see(f"KL / max_kl, reported, {name}", reported / max_kl)
        RECORD.see(f"KL / max_kl, computed again, {name}", kl[region] / max_kl)
        if kl_error[region] < 0.01 * max_kl:  # a scale of 1e-5 leaves float32 few digits of a change of loc / scale
            RECORD.see(f"KL / max_kl, computed again, {name}, rounding bound < 1 % of max_kl", kl[region] / max_kl)
        RECORD.see(f"(KL - max_kl) / rounding bound, {name}", (kl[region] - max_kl) / kl_error[region])
        RECORD.see(f"fall of the surrogate / rounding bound, {name}", -gain[region] / gain_error[region])


def check_case(case, layout):
    torch.manual_seed(case.seed)
    with set_composite_lp_aggregate(False):
        actor = make_case_policy(case, layout)
        clean, data, broken = make_case_data(case, actor)
        chunk_size = None if case.pieces is None else math.ceil(math.prod(case.batch) / case.pieces)
        keywords = {"entropy_coeff": case.entropy_coeff, "max_importance_ratio": case.cap}
        loss = make_loss(actor, chunk_size=chunk_size, **keywords)
        if case.mask != "none":
            loss.loss_mask_key = "mask"
        sequential = layout == "sequential"
        objective = HATRPOSequentialObjective(loss, agent_order=case.agent_order) if sequential else loss
        for update in range(UPDATES_PER_EXAMPLE):
            check_update(case, layout, objective, loss, actor, clean, data, broken, case.seed + update)


def try_updates(layout, updates):
    """Checks at least so many updates."""
    examples = math.ceil(updates / UPDATES_PER_EXAMPLE)

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(case=CASES)
    def check(case):
        check_case(case, layout)

    before = RECORD.updates
    check()
    assert RECORD.updates - before >= updates


@pytest.mark.parametrize("layout", LAYOUTS)
@OLD_DATA
@pytest.mark.filterwarnings("ignore:The gradient of region")
def test_every_update(layout):
    try_updates(layout, math.ceil(UPDATES / len(LAYOUTS)))
    print(RECORD)


if __name__ == "__main__":
    torch.set_num_threads(1)
    total = int(sys.argv[1]) if len(sys.argv) > 1 else UPDATES
    for chosen in LAYOUTS:
        try_updates(chosen, math.ceil(total / len(LAYOUTS)))
    print(RECORD)
