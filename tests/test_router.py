"""The router: mixing weights against a naive loop, its samples against `torch.distributions`, hard cases, refusals."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from peft.tuners.poly.router import PolyRouter as PeftPolyRouter
from torch.distributions import RelaxedBernoulli

from peft_poly import PolyConfig, PolyRouter, Router, get_router
from peft_poly.router import logistic_noise, weigh

SIZES = [(1, 1, 1), (1, 1, 4), (3, 1, 5), (2, 4, 1), (5, 3, 2), (3, 4, 8)]  # n_tasks, n_splits, n_skills


def make_router(n_tasks=3, n_splits=2, n_skills=4, spread=2.0, seed=0, **settings) -> PolyRouter:
    router = get_router(PolyConfig(n_tasks=n_tasks, n_splits=n_splits, n_skills=n_skills, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.module_logits.copy_(torch.randn(router.module_logits.shape, generator=generator) * spread)
    return router.eval()


def naive_weights(router: PolyRouter, task: int, n_splits: int, n_skills: int) -> torch.Tensor:
    row = router.module_logits[task].tolist()
    weights = []
    for split in range(n_splits):
        p = [1 / (1 + math.exp(-row[split * n_skills + skill])) for skill in range(n_skills)]
        weights.append([value / (sum(p) + 1e-12) for value in p])
    return torch.tensor(weights)


@pytest.mark.parametrize(("n_tasks", "n_splits", "n_skills"), SIZES)
def test_at_eval_the_weights_are_normalised_sigmoids(n_tasks, n_splits, n_skills):
    router = make_router(n_tasks, n_splits, n_skills)
    ids = torch.tensor([0, n_tasks - 1, n_tasks // 2, 0])
    expected = torch.stack([naive_weights(router, task, n_splits, n_skills) for task in ids.tolist()])
    torch.testing.assert_close(router(ids), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("n_tasks", "n_splits", "n_skills"), SIZES)
def test_the_weights_sum_to_one_inside_each_split_and_never_over_all(n_tasks, n_splits, n_skills, training):
    weights = make_router(n_tasks, n_splits, n_skills).train(training)(torch.arange(n_tasks))
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(n_tasks, n_splits))
    torch.testing.assert_close(weights.sum(dim=(1, 2)), torch.full((n_tasks,), float(n_splits)))


def test_the_logits_of_one_split_do_not_touch_the_weights_of_another():
    router, ids = make_router(), torch.tensor([1])
    before = router(ids)
    with torch.no_grad():
        router.module_logits[1, 4:] += torch.tensor([3.0, -3.0, 1.0, 0.0])
    after = router(ids)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])


@pytest.mark.parametrize("ids", [torch.tensor([[0], [2]]), torch.tensor([0, 2], dtype=torch.int32)])
def test_ids_may_be_a_column_or_int32(ids):
    router = make_router()
    assert torch.equal(router(ids), router(torch.tensor([0, 2])))


def relaxed_bernoulli(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return weigh(logits, logistic_noise(logits), temperature)[1]


class TestSampling:
    @pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 3.0])
    def test_one_seed_gives_the_draws_of_torch_distributions(self, temperature):
        logits = torch.randn(64, 4, 8) * 3
        torch.manual_seed(7)
        ours = relaxed_bernoulli(logits, temperature)
        torch.manual_seed(7)
        theirs = RelaxedBernoulli(torch.tensor(temperature), logits=logits).rsample()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_one_seed_gives_the_gradients_of_torch_distributions(self):
        gradients = []
        for sample in (lambda z: relaxed_bernoulli(z, 0.7), lambda z: RelaxedBernoulli(0.7, logits=z).rsample()):
            logits = torch.linspace(-3, 3, 96, dtype=torch.float64).requires_grad_()
            torch.manual_seed(7)
            (sample(logits) * torch.arange(96)).sum().backward()
            gradients.append(logits.grad)
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
    @pytest.mark.parametrize("logit", [-2.0, 0.0, 0.5, 3.0])
    def test_other_seeds_give_the_same_distribution(self, logit, temperature):
        n = 100_000
        ours = relaxed_bernoulli(torch.full((n,), logit, dtype=torch.float64), temperature)
        theirs = RelaxedBernoulli(temperature, logits=torch.tensor(logit, dtype=torch.float64)).sample((n,))
        assert abs(ours.mean() - theirs.mean()) < 5 / math.sqrt(2 * n)  # five standard errors of values in [0, 1]
        assert abs(ours.var() - theirs.var()) < 5 / math.sqrt(2 * n)
        distance = (torch.searchsorted(ours.sort()[0], theirs.sort()[0]) / n - torch.arange(n) / n).abs().max()
        assert distance < 1.95 * math.sqrt(2 / n)  # Kolmogorov-Smirnov at 0.1 %

    @pytest.mark.parametrize("temperature", [0.2, 1.0, 2.5])
    def test_the_router_draws_a_relaxed_bernoulli_of_its_temperature(self, temperature):
        router = make_router(router_temperature=temperature).train()
        ids = torch.tensor([0, 1, 2, 2, 1])
        torch.manual_seed(3)
        ours = router(ids)
        torch.manual_seed(3)
        p = RelaxedBernoulli(temperature, logits=router.module_logits[ids].view(5, 2, 4)).rsample()
        torch.testing.assert_close(ours, p / (p.sum(dim=-1, keepdim=True) + 1e-12), rtol=1e-4, atol=1e-5)

    def test_a_low_temperature_makes_nearly_binary_choices_with_the_right_odds(self):
        sample = relaxed_bernoulli(torch.full((50_000,), 1.0), 0.01)
        assert ((sample < 0.01) | (sample > 0.99)).float().mean() > 0.97
        assert abs((sample > 0.5).float().mean() - torch.sigmoid(torch.tensor(1.0))) < 0.01

    def test_rows_of_one_task_draw_independently(self):
        weights = make_router(n_splits=1, n_skills=2, spread=0.0).train()(torch.zeros(20_000, dtype=torch.long))[
            :, 0, 0
        ]
        assert weights.unique().numel() > 15_000
        correlation = torch.corrcoef(torch.stack([weights[::2], weights[1::2]]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(10_000)

    def test_the_temperature_plays_no_part_at_eval(self):
        ids = torch.arange(3)
        assert torch.equal(make_router(router_temperature=0.1)(ids), make_router(router_temperature=5.0)(ids))

    def test_without_noise_training_is_eval_and_uses_no_random_numbers(self):
        router, ids = make_router(router_noise=False), torch.arange(3)
        expected, state = router(ids), torch.get_rng_state()
        assert torch.equal(router.train()(ids), expected)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize(
        ("training", "noise", "samples"), [(True, True, True), (True, False, False), (False, True, False)]
    )
    def test_it_says_whether_it_samples(self, training, noise, samples):
        assert make_router(router_noise=noise).train(training).samples is samples


class TestSmallNumbers:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("logit", [-12.0, -20.0])
    def test_logits_that_underflow_below_float32_still_mix(self, dtype, logit):
        router = make_router(spread=0.0).to(dtype)
        torch.nn.init.constant_(router.module_logits, logit)
        weights = router(torch.arange(3))
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, torch.full((3, 2, 4), 0.25), rtol=1e-2, atol=0)

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("logit", [-60_000.0, -200.0, -40.0, 40.0, 60_000.0])
    def test_extreme_logits_give_neither_nan_nor_infinity(self, dtype, logit, training):
        router = make_router(spread=0.0).to(dtype).train(training)
        torch.nn.init.constant_(router.module_logits, logit)
        weights = router(torch.arange(3))
        weights.square().sum().backward()
        assert weights.isfinite().all()
        assert router.module_logits.grad.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_half_precision_router_gets_half_precision_gradients(self, dtype):
        router = make_router().to(dtype)
        router(torch.tensor([1])).square().sum().backward()
        assert router.module_logits.grad.dtype == dtype
        assert router.module_logits.grad[1].abs().sum() > 0
        assert router.module_logits.grad[[0, 2]].abs().sum() == 0


class TestRefusals:
    @pytest.mark.parametrize("bad", [-1, -3, 3, 100])
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_an_id_out_of_range_fails_and_never_wraps(self, bad, training):
        with pytest.raises(IndexError, match="out of range"):
            make_router().train(training)(torch.tensor([0, bad]))

    def test_no_ids_are_refused(self):
        with pytest.raises(
            ValueError, match=r"^task_ids should not be None: a router needs to know the task of each row"
        ):
            make_router()(None)

    def test_an_unknown_kind_of_router_is_refused(self):
        config = PolyConfig()
        config.poly_type = "c-poly"
        with pytest.raises(
            ValueError, match=r"^Unsupported poly_type 'c-poly'\. Supported are: \['gates', 'poly'\]\.$"
        ):
            get_router(config)

    def test_the_base_class_is_abstract(self):
        with pytest.raises(TypeError, match="abstract"):
            Router()


class TestPeftsOwnRouter:
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize(("n_tasks", "n_splits", "n_skills"), SIZES)
    def test_one_state_and_one_seed_give_equal_weights(self, n_tasks, n_splits, n_skills, training):
        ours = make_router(n_tasks, n_splits, n_skills).train(training)
        theirs = PeftPolyRouter(peft.PolyConfig(n_tasks=n_tasks, n_splits=n_splits, n_skills=n_skills)).train(training)
        theirs.load_state_dict(ours.state_dict())
        ids = torch.randint(n_tasks, (7,))
        torch.manual_seed(11)
        expected = theirs(ids, None)
        torch.manual_seed(11)
        torch.testing.assert_close(ours(ids), expected, rtol=1e-4, atol=1e-5)

    def test_one_seed_gives_equal_initial_logits_within_their_range(self):
        settings = {"n_tasks": 50, "n_splits": 4, "n_skills": 8}
        ours, theirs = get_router(PolyConfig(**settings)), PeftPolyRouter(peft.PolyConfig(**settings))
        for router in (ours, theirs):
            torch.manual_seed(5)
            router.reset()
        assert torch.equal(ours.module_logits, theirs.module_logits)
        assert 0.99e-3 < ours.module_logits.abs().max() <= 1e-3


def test_it_shows_its_sizes_and_counts_its_rows():
    router = make_router(n_tasks=5, n_splits=2, n_skills=3)
    assert repr(router) == "PolyRouter(n_tasks=5, n_splits=2, n_skills=3)"
    assert (router.n_tasks, tuple(router.module_logits.shape)) == (5, (5, 6))
