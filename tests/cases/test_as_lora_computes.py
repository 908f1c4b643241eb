"""What looks at a layer's operations one by one finds what it finds in a LoRA: `torch.func`, traces, instruments."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from adapters import adapt, poly
from tiny import CASES, TASKS
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from peft_poly import PolyConfig
from peft_poly.layer import Linear

IDS = [0, 2, 1, 0, 2, 2]
KINDS = {"poly": {}, "splits": {"n_splits": 2, "lora_alpha": 8.0}, "gates": {"poly_type": "gates"}}
each_kind = pytest.mark.parametrize("kind", list(KINDS))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def made(kind: str = "poly") -> peft.PeftModel:
    torch.manual_seed(0)
    config = PolyConfig(target_modules=["0", "2"], init_weights=False, n_tasks=3, router_noise=False, **KINDS[kind])
    return adapt(net(), config, autocast_adapter_dtype=False).double()


def as_lora(model: peft.PeftModel, task: int) -> peft.PeftModel:
    """The task as a LoRA in the same base model: the measure."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["0", "2"], r=8, lora_alpha=8)
    lora = peft.get_peft_model(net(), config, autocast_adapter_dtype=False).double().eval()
    for name in ("0", "2"):
        ours, theirs = model.get_base_model().get_submodule(name), lora.get_base_model().get_submodule(name)
        A, B = ours.mixed_pair("default", torch.tensor([task]))
        theirs.lora_A["default"].weight.data = A[0].detach().T.contiguous()
        theirs.lora_B["default"].weight.data = (B[0].detach().T * ours.scaling["default"]).contiguous()
    return lora


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------------------------------- torch.func
@each_kind
@pytest.mark.parametrize("given", ["one", "mapped", "names"])
def test_the_gradient_of_each_row_by_vmap_is_that_of_the_row_alone(kind, given, x):
    model = made(kind)
    ids = torch.tensor(IDS if given == "mapped" else [1] * 6)

    def loss(parameters, row, task):
        task = {"one": 1, "names": [1], "mapped": task}[given]
        return functional_call(model, parameters, (row[None],), {"task_ids": task}).pow(2).sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))(trainable(model), x, ids)
    for row in range(6):
        model.zero_grad()
        model(x[row : row + 1], task_ids=int(ids[row])).pow(2).sum().backward()
        for name, gradient in each.items():
            torch.testing.assert_close(gradient[row], model.get_parameter(name).grad)


@each_kind
@pytest.mark.parametrize("shape", [(6, 8), (6, 5, 8)])
@pytest.mark.parametrize("door", [jvp, vjp, grad], ids=lambda door: door.__name__)
def test_a_mixed_batch_has_the_derivatives_of_each_row_alone(kind, shape, door):
    model, x, v = made(kind), *torch.randn(2, *shape, dtype=torch.float64)

    def derivative(rows: slice) -> torch.Tensor:
        def function(z):
            return model(z, task_ids=IDS[rows])

        if door is jvp:
            return jvp(function, (x[rows],), (v[rows],))[1]
        if door is vjp:
            out, back = vjp(function, x[rows])
            return back(torch.ones_like(out))[0]
        return grad(lambda z: function(z).sin().sum())(x[rows])

    torch.testing.assert_close(derivative(slice(None)), torch.cat([derivative(slice(n, n + 1)) for n in range(6)]))


@each_kind
@pytest.mark.parametrize("shape", [(6, 8), (6, 5, 8)])
def test_the_gradient_of_a_mixed_batch_by_its_parameters_is_that_of_a_backward(kind, shape):
    model, x = made(kind), torch.randn(*shape, dtype=torch.float64)

    def loss(parameters):
        return functional_call(model, parameters, (x,), {"task_ids": IDS}).pow(2).sum()

    found = grad(loss)(trainable(model))
    model(x, task_ids=IDS).pow(2).sum().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)


@each_kind
def test_jacobians_and_products_are_those_of_the_lora(kind, x):
    model = made(kind)
    lora, direction = as_lora(model, 1), torch.ones_like(x)
    for mode in (True, False):
        model.requires_grad_(mode)
        ours, theirs = (lambda z: model(z, task_ids=1)), lora
        torch.testing.assert_close(jacrev(ours)(x), jacrev(theirs)(x))
        torch.testing.assert_close(jacfwd(ours)(x), jacfwd(theirs)(x))
        torch.testing.assert_close(jvp(ours, (x,), (direction,)), jvp(theirs, (x,), (direction,)))
        torch.testing.assert_close(vjp(ours, x)[1](ours(x)), vjp(theirs, x)[1](theirs(x)))
        torch.testing.assert_close(vmap(ours)(x[:, None]), vmap(theirs)(x[:, None]))
        seconds = [hessian(lambda z, net_=net_: net_(z).pow(2).sum())(x[:2]) for net_ in (ours, theirs)]
        torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("gradients", [True, False])
def test_forward_mode_derivatives_are_those_of_the_lora(gradients, x):
    model = made()
    tangents = []
    for net_ in (lambda z: model(z, task_ids=2), as_lora(model, 2)):
        with torch.set_grad_enabled(gradients), forward_ad.dual_level():
            out = net_(forward_ad.make_dual(x, torch.ones_like(x)))
            tangents.append(forward_ad.unpack_dual(out).tangent)
    torch.testing.assert_close(*tangents)


@each_kind
def test_a_gradient_penalty_and_higher_derivatives_are_right(kind, x):
    model = made(kind)
    lora, results = as_lora(model, 1), []
    for net_ in (lambda z: model(z, task_ids=1), lora):
        z = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(net_(z).pow(3).sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), z, create_graph=True)
        (third,) = torch.autograd.grad(second.pow(2).sum(), z)
        results.append((first, second, third))
    torch.testing.assert_close(*results)


@each_kind
@pytest.mark.parametrize("ids", [IDS, 1], ids=str)
def test_second_derivatives_are_right_for_every_parameter(kind, ids, x):
    model = made(kind)
    parameters = [p for p in model.parameters() if p.requires_grad]
    x = x.requires_grad_()

    def function(z, *_):
        return model(z, task_ids=ids)

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *parameters), fast_mode=True)


def test_jacobians_by_batched_backwards_are_right(x):
    model = made()

    def ours(z):
        return model(z, task_ids=IDS)

    for vectorize in (True, False):
        found = torch.autograd.functional.jacobian(ours, x, vectorize=vectorize)
        torch.testing.assert_close(found, jacrev(ours)(x))


def test_an_id_out_of_range_is_an_error_where_ids_are_mapped(x):
    model = made()
    with pytest.raises((IndexError, RuntimeError)):
        vmap(lambda row, task: model(row[None], task_ids=task))(x, torch.tensor([0, 1, 2, 3, 0, 0]))


# ------------------------------------------------------------------------------------------------------------- traces
class WithIds(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x, ids):
        return self.model(x, task_ids=ids)


@each_kind
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("shape", [(6, 8), (6, 3, 8)])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_follows_the_ids_that_it_is_called_with(kind, gradients, shape):
    model, x = made(kind), torch.randn(shape, dtype=torch.float64)
    for example in (IDS, [1] * 6):
        with torch.set_grad_enabled(gradients):
            traced = torch.jit.trace(WithIds(model), (x, torch.tensor(example)), check_trace=False)
        for ids in (IDS, [2, 1, 0, 0, 1, 2], [2] * 6):
            torch.testing.assert_close(traced(x, torch.tensor(ids)), model(x, task_ids=ids))
        fewer = traced(x[:4], torch.tensor([2, 0, 1, 1]))
        torch.testing.assert_close(fewer, model(x[:4], task_ids=[2, 0, 1, 1]))
        torch.testing.assert_close(traced(x[:1], torch.tensor([2])), model(x[:1], task_ids=[2]))
        with pytest.raises((IndexError, RuntimeError)):
            traced(x, torch.tensor([0, 0, 0, 0, 0, 3]))


@each_kind
@pytest.mark.parametrize("shape", [(1, 8), (1, 5, 8)])
def test_a_trace_of_one_row_follows_the_ids_and_takes_more_rows(kind, shape):
    model, x = made(kind), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        traced = torch.jit.trace(WithIds(model), (x, torch.tensor([1])), check_trace=False)
        for ids in ([0], [2], IDS):
            rows = torch.randn(len(ids), *shape[1:], dtype=torch.float64)
            torch.testing.assert_close(traced(rows, torch.tensor(ids)), model(rows, task_ids=ids))


@each_kind
@pytest.mark.parametrize("shape", [(5, 8), (5, 1, 8)])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_trace_of_one_task_takes_as_many_rows_as_come(kind, shape, rows):
    model = made(kind)
    with torch.no_grad(), model.use_task(2):
        traced = torch.jit.trace(model, torch.randn(rows, *shape[1:], dtype=torch.float64), check_trace=False)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(traced(x), model(x, task_ids=2))


def test_an_exported_program_follows_the_ids(x):
    model = made()
    with torch.no_grad():
        program = torch.export.export(WithIds(model), (x, torch.tensor(IDS))).module()
        for ids in ([2, 1, 0, 0, 1, 2], [1] * 6):
            torch.testing.assert_close(program(x, torch.tensor(ids)), model(x, task_ids=ids))


# -------------------------------------------------------------------------------------------------------- instruments
@pytest.fixture(params=["nn.Linear.forward", "nn.Linear.__call__", "nn.Module.__call__"])
def seen(request, monkeypatch):
    """Layers that an instrument on a class has seen."""
    cls = nn.Module if "Module" in request.param else nn.Linear
    name, layers = request.param.rpartition(".")[2], []
    original = getattr(cls, name)

    def noting(self, *args, **kwargs):
        layers.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(cls, name, noting)
    return layers


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("ids", ["rte", ["rte", "boolq", "sst2"]])
def test_a_patch_of_the_class_sees_every_adapted_base_layer(gradients, ids, seen):
    model = adapt(CASES["llama"].make(), poly("llama", task_names=TASKS, n_tasks=None))
    bases = [layer.base_layer for layer in model.modules() if isinstance(layer, Linear)]
    with torch.set_grad_enabled(gradients):
        model(**CASES["llama"].inputs(), task_ids=ids)
        assert {id(base) for base in bases} <= {id(layer) for layer in seen}
        seen.clear()
        model.generate(CASES["llama"].inputs()["input_ids"], task_ids=ids, max_new_tokens=3, do_sample=False)
    assert all(sum(layer is base for layer in seen) == 3 for base in bases)


def test_a_patch_that_changes_the_outcome_is_obeyed_and_keeps_what_it_saw(monkeypatch):
    model, x = made(), torch.randn(6, 8, dtype=torch.float64)
    original, kept = nn.Linear.forward, []

    def doubled(self, x):
        kept.append((y := 2 * original(self, x)).clone())
        kept.append(y)
        return y

    with torch.no_grad():
        wide = copy.deepcopy(model)
        for layer in wide.modules():
            if isinstance(layer, Linear):
                layer.base_layer.weight *= 2
                layer.base_layer.bias *= 2
        want = wide(x, task_ids=IDS)
        monkeypatch.setattr(nn.Linear, "forward", doubled)
        torch.testing.assert_close(model(x, task_ids=IDS), want)
    assert all(torch.equal(*pair) for pair in zip(kept[::2], kept[1::2], strict=True))


@pytest.mark.parametrize("gradients", [True, False])
def test_hooks_on_base_layers_see_and_change_what_they_return(gradients):
    model, x = made(), torch.randn(6, 8, dtype=torch.float64)
    base, seen = model.get_base_model()[0].base_layer, []
    with torch.set_grad_enabled(gradients):
        plain = model.get_base_model()[0](x, task_ids=IDS)
        base.register_forward_hook(lambda module, args, y: seen.append(y) or y + 1)
        torch.testing.assert_close(model.get_base_model()[0](x, task_ids=IDS), plain + 1)
    torch.testing.assert_close(seen[0], nn.functional.linear(x, base.weight, base.bias))


# ----------------------------------------------------------------------------------------------------- inference mode
def trains(model: nn.Module, **kwargs) -> None:
    inputs = CASES["llama"].inputs()
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()(**inputs, labels=inputs["input_ids"], **kwargs).loss.backward()
    optimizer.step()
    assert any(not torch.equal(model.get_parameter(name), value) for name, value in before.items())


@pytest.mark.parametrize(
    "work",
    [
        lambda model, folder: (model.merge_adapter(task="rte"), model.unmerge_adapter()),
        lambda model, folder: (model.merge_adapter(task="rte", safe_merge=True), model.unmerge_adapter()),
        lambda model, folder: model.add_tasks(["new"]),
        lambda model, folder: model.remove_tasks("boolq"),
        lambda model, folder: (model.average_skills(), model.train_all()),
        lambda model, folder: model.load_adapter(folder, "default", is_trainable=True),
        lambda model, folder: (model.load_adapter(folder, "more", is_trainable=True), model.set_adapter("more")),
        lambda model, folder: (model.add_adapter("more", poly("llama", task_names=TASKS)), model.set_adapter("more")),
        lambda model, folder: model(**CASES["llama"].inputs(), task_ids="rte"),
        lambda model, folder: model.export_lora("rte", folder / "lora"),
        lambda model, folder: model.routing_weights(),
    ],
    ids=["merge", "safe merge", "add", "remove", "average", "load", "load beside", "adapter", "call", "export", "look"],
)  # fmt: skip
def test_what_is_done_in_inference_mode_can_be_trained_afterwards(work, tmp_path):
    model = adapt(CASES["llama"].make().bfloat16(), poly("llama", task_names=TASKS, n_tasks=None))
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        work(model, tmp_path)
    trains(model, task_ids=["rte", "sst2", "rte"])


def test_a_base_model_with_a_task_in_it_can_be_trained_on_too():
    model = adapt(CASES["llama"].make(), poly("llama", task_names=TASKS, n_tasks=None))
    with torch.inference_mode():
        merged = model.merge_and_unload(task="rte")
    trains(merged.requires_grad_(True))


def test_an_adapter_made_in_inference_mode_is_trained():
    base = CASES["llama"].make()
    with torch.inference_mode():
        model = peft.get_peft_model(base, poly("llama", task_names=TASKS, n_tasks=None))
    trains(model, task_ids="rte")


# ---------------------------------------------------------------------------------------------------------- optimizers
def test_lora_fa_is_refused_when_its_optimizer_is_made():
    from peft.optimizers import create_lorafa_optimizer

    with pytest.raises(ValueError, match=r"LoRA-FA .* `create_poly_optimizer`"):
        create_lorafa_optimizer(made(), r=8, lora_alpha=8, lr=1e-3)
    lora = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["0"]))
    assert create_lorafa_optimizer(lora, r=8, lora_alpha=8, lr=1e-3).param_groups
