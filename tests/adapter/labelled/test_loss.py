"""The loss over heads of different kinds, against torch's own losses on each row alone."""

from __future__ import annotations

import pytest
import torch
from labelled import LABELS, NAMES, TARGETS, naive_losses, targets

from peft_poly import TaskHeads
from peft_poly.adapter.labelled.loss import label_loss

WEIGHTED = {
    **LABELS,
    "stars": {"labels": 1, "weights": [0.1]},
    "sentiment": {"labels": ["bad", "good"], "weights": [0.5, 3.0]},
    "genres": {"labels": ["drama", "war", "love"], "kind": "multi_label", "weights": [2.0, 1.0, 0.25]},
}


def case(labels=LABELS):
    torch.manual_seed(0)
    heads = TaskHeads(8, labels)
    x = torch.randn(4, 8)
    return heads, x, heads(x, task_ids=NAMES)


@pytest.mark.parametrize("labels", [LABELS, WEIGHTED], ids=["plain", "weighted"])
def test_it_is_the_mean_of_what_each_row_loses_alone(labels):
    heads, _, logits = case(labels)
    loss = label_loss(logits, targets(), torch.arange(4), heads)
    want = torch.stack(naive_losses(logits, TARGETS, NAMES, labels)).mean()
    torch.testing.assert_close(loss, want)
    grads = torch.autograd.grad(loss, list(heads.parameters()), retain_graph=True)
    for grad, wanted in zip(grads, torch.autograd.grad(want, list(heads.parameters())), strict=True):
        torch.testing.assert_close(grad, wanted)


def test_whole_numbers_do_as_well_as_floats():
    heads, _, logits = case()
    whole, tasks = targets().long(), torch.arange(4)
    assert torch.equal(label_loss(logits, whole, tasks, heads), label_loss(logits, whole.float(), tasks, heads))


@pytest.mark.parametrize("row", range(4))
def test_an_unlabelled_row_does_not_count(row):
    heads, _, logits = case()
    labels = targets()
    labels[row] = -100
    losses = naive_losses(logits, TARGETS, NAMES)
    del losses[row]
    torch.testing.assert_close(label_loss(logits, labels, torch.arange(4), heads), torch.stack(losses).mean())


def test_a_batch_without_labels_loses_nothing_and_gives_no_nan():
    heads, _, logits = case()
    loss = label_loss(logits, torch.full((4,), -100), torch.arange(4), heads)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in heads.parameters())


def test_an_unlabelled_cell_of_several_labels_leaves_the_others():
    heads, _, logits = case()
    labels = targets()
    labels[3, 1] = -100
    own = logits[3, [0, 2]]
    want = torch.nn.BCEWithLogitsLoss()(own, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(label_loss(logits[3:], labels[3:], torch.tensor([3]), heads), want)


def test_a_number_for_a_row_that_has_several_labels_is_refused():
    heads, _, logits = case()
    with pytest.raises(ValueError, match=r"Row 3 .* 'genres', has the label 0\. Allowed is a list of 3 zeros and ones"):
        label_loss(logits, torch.tensor([1, 2, 0, 0]), torch.arange(4), heads)


def test_the_sum_is_divided_by_the_items_that_are_said():
    heads, _, logits = case()
    mean = label_loss(logits, targets(), torch.arange(4), heads)
    torch.testing.assert_close(label_loss(logits, targets(), torch.arange(4), heads, n_items=10), mean * 0.4)
    said = torch.tensor([[10]])
    torch.testing.assert_close(label_loss(logits, targets(), torch.arange(4), heads, n_items=said), mean * 0.4)


def test_smoothing_stays_inside_the_labels_of_a_task():
    heads, _, logits = case()
    loss = label_loss(logits, targets(), torch.arange(4), heads, smoothing=0.2)
    smooth = torch.nn.CrossEntropyLoss(label_smoothing=0.2)
    want = [
        smooth(logits[0, :2], torch.tensor(1)),
        smooth(logits[1], torch.tensor(3)),
        (logits[2, 0] - 2.5) ** 2,
        torch.nn.BCEWithLogitsLoss()(logits[3, :3], torch.tensor([0.1, 0.9, 0.9])),
    ]
    torch.testing.assert_close(loss, torch.stack(want).mean())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in heads.parameters())


def test_tokens_are_averaged_over_all_that_are_labelled():
    labels = {"part": 2, "size": 1, "traits": {"labels": 3, "kind": "multi_label"}}
    heads = TaskHeads(8, labels)
    logits = heads(torch.randn(3, 5, 8), task_ids=list(labels))
    cells = torch.full((3, 5, 3), -100.0)
    cells[0, :4, 0] = torch.tensor([0.0, 1, 1, 0])
    cells[1, 1:3, 0] = torch.tensor([0.5, -2.0])
    cells[2, 0] = torch.tensor([1.0, 0, 1])
    found = [int(value) for value in cells[0, :4, 0]]
    losses = naive_losses(logits[0, :4], found, ["part"] * 4, labels)
    losses += naive_losses(logits[1, 1:3], [0.5, -2.0], ["size"] * 2, labels)
    losses += naive_losses(logits[2, :1], [[1, 0, 1]], ["traits"], labels)
    torch.testing.assert_close(label_loss(logits, cells, torch.arange(3), heads), torch.stack(losses).mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_is_computed_in_float32_at_least(dtype):
    heads, _, logits = case()
    loss = label_loss(logits.to(dtype), targets(), torch.arange(4), heads)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        loss.float(), label_loss(logits, targets(), torch.arange(4), heads), rtol=0.05, atol=0.05
    )
