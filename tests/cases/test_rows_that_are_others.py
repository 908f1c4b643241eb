"""Layers whose first dimension is as long as the batch, though its entries are something else than the rows."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from rows_alone import same_as_alone, two_tasks
from tiny import bert_config
from torch import nn

from peft_poly import use_task

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = ["rte", "sst2", "rte", "sst2"]
REFUSED = r"its rows are not the 2 rows of this call.*exclude_modules"


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(rows * length))


# ----------------------------------------------------------------------------------------------------- sequence first
class SequenceFirst(nn.Module):
    """A recurrent-style stack on `(length, batch, hidden)`, as many hand-written models are."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin0, self.lin1 = nn.Embedding(61, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.emb(input_ids).permute(1, 0, 2).contiguous()
        return self.lin1(self.lin0(hidden).tanh()).transpose(0, 1)

    def generate(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([self(input_ids) for _ in range(4)])


class Flattened(SequenceFirst):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.lin0(self.emb(input_ids).flatten(0, 1)).tanh()).view(*input_ids.shape, 8)


def xlnet() -> nn.Module:
    config = tf.XLNetConfig(vocab_size=61, d_model=16, n_layer=2, n_head=4, d_inner=32, num_labels=3)
    return tf.XLNetForSequenceClassification(config)


def fsmt() -> nn.Module:
    config = tf.FSMTConfig(
        langs=["en", "de"], src_vocab_size=61, tgt_vocab_size=61, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=4, decoder_attention_heads=4,
    )  # fmt: skip
    return tf.FSMTForConditionalGeneration(config)


def longformer() -> nn.Module:
    config = tf.LongformerConfig(attention_window=4, vocab_size=61, max_position_embeddings=64, num_labels=3, **SMALL)
    return tf.LongformerForSequenceClassification(config)


def bert() -> nn.Module:
    return tf.BertForSequenceClassification(bert_config())


NEWER_FSMT = pytest.param(fsmt, marks=pytest.mark.transformers_5(reason="has an FSMT that cannot be called"))


@pytest.mark.parametrize("length", [4, 5])
@pytest.mark.parametrize("make", [SequenceFirst, xlnet, NEWER_FSMT, longformer, bert])
def test_as_many_tokens_as_rows_or_not(make, length):
    torch.manual_seed(0)
    exclude = r".*_global" if make is longformer else None  # tokens picked by a mask: refused
    model = two_tasks(make(), exclude_modules=exclude)

    def call(x: torch.Tensor, task_ids) -> torch.Tensor:
        given = {"decoder_input_ids": x.flip(1)} if make is fsmt else {}
        output = model(input_ids=x, task_ids=task_ids, **given)
        return getattr(output, "logits", output)

    same_as_alone(call, IDS, tokens(4, length))


@pytest.mark.parametrize("kind", [{}, {"poly_type": "gates"}], ids=["poly", "gates"])
@pytest.mark.parametrize("make", [SequenceFirst, Flattened])
def test_what_is_kept_from_call_to_call_minds_where_the_rows_are(make, kind):
    torch.manual_seed(0)
    model, x = two_tasks(make(), **kind), tokens(4, 4)
    alone = torch.cat([model(x[row : row + 1], task_ids=task) for row, task in enumerate(IDS)])

    def several(task_ids) -> list[torch.Tensor]:
        return [model(x, task_ids=task_ids) for _ in range(3)]

    with torch.no_grad():
        with model.serving():
            outputs = several(IDS)
        outputs += list(model.generate(x, task_ids=IDS))
    for output in outputs:
        torch.testing.assert_close(output, alone, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- towers
def llava() -> nn.Module:
    vision = tf.CLIPVisionConfig(**SMALL, image_size=8, patch_size=4)
    text = tf.LlamaConfig(vocab_size=61, pad_token_id=0, **SMALL)
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=60, vision_feature_layer=-1)
    )


TEXT_AND_IMAGES = torch.tensor([[2] + [7] * 8 + [5], [2] + [60] * 8 + [5]])  # row 1 has both images


@pytest.mark.parametrize("target", ["q_proj", r".*vision_tower.*out_proj", r".*multi_modal_projector.linear_1"])
def test_two_images_of_one_row_are_no_two_rows(target):
    torch.manual_seed(0)
    model = two_tasks(llava(), target_modules=[target] if target == "q_proj" else target)
    images = torch.randn(2, 3, 8, 8)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(ValueError, match=REFUSED):
            model(input_ids=TEXT_AND_IMAGES, pixel_values=images, task_ids=["rte", "sst2"])
    with torch.no_grad():
        one = model(input_ids=TEXT_AND_IMAGES, pixel_values=images, task_ids="sst2").logits[1]
        alone = model(input_ids=TEXT_AND_IMAGES[1:], pixel_values=images, task_ids=["sst2"]).logits[0]
    torch.testing.assert_close(one, alone)


def test_a_language_model_beside_a_tower_serves_mixed_batches():
    torch.manual_seed(0)
    model = two_tasks(llava(), exclude_modules=r".*(vision_tower|multi_modal_projector).*")
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        mixed = model(input_ids=TEXT_AND_IMAGES, pixel_values=images, task_ids=["rte", "sst2"]).logits
        alone = model(input_ids=TEXT_AND_IMAGES[1:], pixel_values=images, task_ids="sst2").logits[0]
        text = model(input_ids=TEXT_AND_IMAGES[:1], task_ids="rte").logits[0]
    torch.testing.assert_close(mixed[1], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[0], text, atol=1e-5, rtol=1e-5)


def test_a_text_and_an_image_tower_side_by_side():
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": 61, "eos_token_id": 60, "bos_token_id": 1, "max_position_embeddings": 16}
    config = tf.CLIPConfig(
        text_config=text, vision_config={**SMALL, "image_size": 8, "patch_size": 4}, projection_dim=8
    )
    x, images = tokens(2, 6), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=REFUSED):
        two_tasks(tf.CLIPModel(config))(input_ids=x, pixel_values=images, task_ids=["rte", "sst2"])
    model = two_tasks(tf.CLIPModel(config), target_modules=r"text_model.*(q_proj|fc1)|text_projection")
    same_as_alone(
        lambda x, task_ids: model(input_ids=x, pixel_values=images, task_ids=task_ids).text_embeds, ["rte", "sst2"], x
    )


def test_an_encoder_of_images_and_a_decoder_of_text():
    torch.manual_seed(0)
    encoder = tf.ViTConfig(**SMALL, image_size=8, patch_size=4)
    decoder = tf.GPT2Config(n_embd=16, n_layer=1, n_head=4, vocab_size=61, n_positions=16, add_cross_attention=True)
    base = tf.VisionEncoderDecoderModel(tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))
    model = two_tasks(base)
    same_as_alone(
        lambda images, x, task_ids: model(pixel_values=images, decoder_input_ids=x, task_ids=task_ids).logits,
        ["rte", "sst2"], torch.randn(2, 3, 8, 8), tokens(2, 2),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ experts
class Experts(nn.Module):
    """Two experts that get the tokens that a gate picks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mix, self.gate = nn.Embedding(61, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.parts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.mix(self.emb(input_ids))
        tokens = hidden.view(-1, 8)
        chosen = self.gate(tokens).argmax(-1)
        out = torch.zeros_like(tokens)
        for index, part in enumerate(self.parts):
            where = torch.where(chosen == index)[0]
            out.index_add_(0, where, part(tokens[where]))
        return hidden + out.view(hidden.shape)


def test_the_tokens_of_an_expert_are_never_taken_for_rows():
    torch.manual_seed(0)
    model = two_tasks(Experts(), target_modules=["parts.0", "parts.1"])
    for seed in range(20):
        x = torch.randint(0, 61, (2, 2), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad(), pytest.raises(ValueError, match=REFUSED):
            model(x, task_ids=["rte", "sst2"])
        model(x, task_ids="rte")


def test_flattened_tokens_are_followed_and_experts_can_be_left_out():
    torch.manual_seed(0)
    model = two_tasks(Experts(), target_modules=["mix", "gate"])
    same_as_alone(lambda x, task_ids: model(x, task_ids=task_ids), IDS, tokens(4, 5))


# ------------------------------------------------------------------------------------------------------ other layouts
def test_choices_are_followed_where_the_model_flattens_them():
    torch.manual_seed(0)
    model = two_tasks(tf.BertForMultipleChoice(bert_config()))
    x = torch.randint(3, 61, (2, 3, 5))
    same_as_alone(lambda x, task_ids: model(input_ids=x, task_ids=task_ids).logits, ["rte", "sst2"], x)
    with model.use_task(["rte", "sst2"]):
        torch.testing.assert_close(model(input_ids=x).logits, model(input_ids=x, task_ids=["rte", "sst2"]).logits)


class Codes(nn.Module):
    """Ids `(batch, length, codebooks)` that are summed, as in CSM."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.q = nn.Embedding(61, 8), nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.q(self.emb(input_ids).sum(2))


def test_other_ids_of_three_dimensions_are_no_choices():
    torch.manual_seed(0)
    model = two_tasks(Codes(), target_modules=["q"])
    same_as_alone(
        lambda x, task_ids: model(input_ids=x, task_ids=task_ids), ["rte", "sst2"], torch.randint(0, 61, (2, 5, 3))
    )


def deberta(**settings) -> nn.Module:
    settings = {"share_att_key": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", **settings}
    config = tf.DebertaV2Config(
        vocab_size=61, relative_attention=True, position_buckets=8, position_biased_input=False, type_vocab_size=0,
        **SMALL, **settings,
    )  # fmt: skip
    return tf.DebertaV2ForSequenceClassification(config)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("rows", [4, 16])  # 16: as many as the table of positions
def test_a_table_of_positions_is_computed_for_each_task(share, rows):
    torch.manual_seed(0)
    model = two_tasks(deberta(share_att_key=share), target_modules=["query_proj", "key_proj", "value_proj"])
    same_as_alone(lambda x, task_ids: model(input_ids=x, task_ids=task_ids).logits, (IDS * 4)[:rows], tokens(rows, 8))


def test_a_trace_of_a_table_of_positions_is_refused_for_it_would_keep_the_tasks():
    torch.manual_seed(0)
    model = two_tasks(deberta(), target_modules=["query_proj"])

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=x, task_ids=ids).logits

    with torch.no_grad(), pytest.raises(ValueError, match=r"a trace, or `torch\.func`, cannot follow"):
        torch.jit.trace(Traced(), (tokens(2, 8), torch.tensor([0, 1])), check_trace=False)


def test_a_table_of_positions_in_training():
    torch.manual_seed(0)
    model = two_tasks(deberta(), target_modules=["query_proj", "value_proj"], router_noise=False)
    x = tokens(4, 8)

    def gradients(*calls) -> list[torch.Tensor]:
        model.zero_grad()
        for rows, task_ids in calls:
            model(input_ids=x[rows], task_ids=task_ids).logits.pow(2).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    mixed = gradients((slice(None), IDS))
    alone = gradients(*((slice(row, row + 1), task) for row, task in enumerate(IDS)))
    for one, other in zip(mixed, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_rows_that_a_wrapper_sorts_are_not_seen_but_another_number_of_them_is():
    torch.manual_seed(0)
    model = two_tasks(bert())
    with (
        use_task(model, ["rte", "sst2"]),
        pytest.raises(ValueError, match=r"has 2 entries but the input of .* has 4 rows"),
    ):
        model(input_ids=tokens(4, 5))


class Left(nn.Module):
    """Its second layer is left out at random in training, as `layerdrop` does."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin0, self.lin1, self.left_out = nn.Embedding(61, 8), nn.Linear(8, 8), nn.Linear(8, 8), True

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.lin0(self.emb(input_ids).transpose(0, 1))
        return (hidden if self.left_out else self.lin1(hidden)).transpose(0, 1)


def test_a_layer_that_was_left_out_of_the_first_call_is_never_guessed_and_learnt_in_the_next():
    torch.manual_seed(0)
    model = two_tasks(Left())
    with torch.no_grad():
        model(tokens(4, 4), task_ids=IDS)
        model.get_base_model().left_out = False
        with pytest.raises(ValueError, match="its rows are not the 4 rows of this call"):
            model(tokens(4, 4), task_ids=IDS)
    same_as_alone(lambda x, task_ids: model(x, task_ids=task_ids), IDS, tokens(4, 4))


# ----------------------------------------------------------------------------------------------- rows in another order
class Moves(nn.Module):
    """Computes with its rows in another order, and puts them back."""

    def __init__(self, move, back) -> None:
        super().__init__()
        self.emb, self.lin, self.move, self.back = nn.Embedding(61, 8), nn.Linear(8, 8), move, back

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.emb(input_ids)
        order = hidden.sum((1, 2)).argsort()
        return self.back(self.lin(self.move(hidden, order)), order)


def written(into, order, x):
    into[order] = x
    return into


def one_hot(order):
    return nn.functional.one_hot(order, len(order)).float()


def taken(x, order):
    return x[order]


def put_back(x, order):
    return x[order.argsort()]


MOVES = {
    "index": (lambda x, order: x[order], lambda x, order: x[order.argsort()]),
    "select": (lambda x, order: x.index_select(0, order), lambda x, order: x.index_select(0, order.argsort())),
    "gather": (
        lambda x, order: x.gather(0, order[:, None, None].expand_as(x)),
        lambda x, order: x[order.argsort()],
    ),
    "flip": (lambda x, order: x.flip(0), lambda x, order: x.flip(0)),
    "roll": (lambda x, order: x.roll(1, 0), lambda x, order: x.roll(-1, 0)),
    "cat": (lambda x, order: torch.cat([x[1:], x[:1]]), lambda x, order: x.roll(1, 0)),
    "write to new": (lambda x, order: written(torch.empty_like(x), order, x), taken),
    "write to old": (lambda x, order: written(x.clone(), order, x), taken),
    "index_copy": (lambda x, order: torch.zeros_like(x).index_copy(0, order, x), taken),
    "copied over new": (lambda x, order: torch.zeros_like(x).copy_(x[order]), put_back),
    "written over new": (lambda x, order: written(torch.empty_like(x), slice(None), x.flip(0)), lambda x, _: x.flip(0)),
    "added to zeros": (lambda x, order: torch.zeros_like(x) + x[order], put_back),
    "added to new": (lambda x, order: x.new_zeros(x.shape).add_(x.index_select(0, order)), put_back),
    "times ones": (lambda x, order: x.roll(1, 0) * torch.ones_like(x), lambda x, order: x.roll(-1, 0)),
    "in place of": (lambda x, order: torch.where(order.sum() > 0, x[order], x), put_back),
    "scattered": (lambda x, order: x.masked_scatter(torch.ones_like(x).bool(), x[order]), put_back),
    "beside": (lambda x, order: torch.cat([x[order], x], 1)[:, : x.shape[1]], put_back),
    "joined, then added": (lambda x, _: x * 0 + torch.cat([x[1:], x[:1]]), lambda x, _: x.roll(1, 0)),
    "halves, then added": (lambda x, _: x * 0 + torch.cat([x[2:], x[:2]]), lambda x, _: x.roll(2, 0)),
    "stacked": (lambda x, order: torch.stack([x[n] for n in order.tolist()]), put_back),
    "stacked, then added": (lambda x, order: x * 0 + torch.stack([x[n] for n in order.tolist()]), put_back),
    "written, then added": (lambda x, order: torch.zeros_like(x) + written(torch.empty_like(x), order, x), taken),
    "product": (
        lambda x, order: (one_hot(order) @ x.flatten(1)).view_as(x),
        lambda x, order: (one_hot(order).T @ x.flatten(1)).view_as(x),
    ),
    "einsum": (
        lambda x, order: torch.einsum("ij,jld->ild", one_hot(order), x),
        lambda x, order: torch.einsum("ji,jld->ild", one_hot(order), x),
    ),
    "two views": (lambda x, order: torch.cat([x, x]), lambda x, order: x[: len(order)]),
    "tiles": (lambda x, order: x.repeat(2, 1, 1), lambda x, order: x[: len(order)]),
}


@pytest.mark.parametrize("length", [4, 5])
@pytest.mark.parametrize("how", MOVES)
def test_rows_that_were_moved_are_refused(how, length):
    torch.manual_seed(0)
    model = two_tasks(Moves(*MOVES[how]))
    x = tokens(4, length)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(ValueError, match="its rows are not the 4 rows of this call"):
            model(x, task_ids=IDS)
    alone = torch.cat([model(x[row : row + 1], task_ids="rte") for row in range(4)])
    torch.testing.assert_close(model(x, task_ids="rte"), alone, atol=1e-5, rtol=1e-5)


IN_PARTS = {
    "halves": lambda x: torch.cat([x[:2], x[2:]]),
    "chunks": lambda x: torch.cat(x.chunk(4)),
    "one by one": lambda x: torch.stack([x[n] for n in range(len(x))]),
    "unbound": lambda x: torch.stack(x.unbind(0), 1).transpose(0, 1),
    "flattened": lambda x: torch.cat(x.flatten(0, 1).split(x.shape[1])).view_as(x),
}


@pytest.mark.parametrize("length", [4, 5])
@pytest.mark.parametrize("how", IN_PARTS)
def test_parts_that_are_put_together_in_order_are_followed(how, length):
    torch.manual_seed(0)
    model = two_tasks(Moves(lambda x, _: IN_PARTS[how](x), lambda x, _: x))
    same_as_alone(lambda x, task_ids: model(x, task_ids=task_ids), IDS, tokens(4, length))


class Switches(nn.Module):
    """Another layout for long inputs, or where a flag says so."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin = nn.Embedding(61, 8), nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor, turned: bool = False, layout: str = "rows") -> torch.Tensor:
        hidden = self.emb(input_ids)
        if turned or layout == "length" or input_ids.shape[1] >= 4:
            return self.lin(hidden.transpose(0, 1)).transpose(0, 1)
        return self.lin(hidden)


@pytest.mark.parametrize("later", [{"turned": True}, {"layout": "length"}, {}], ids=["flag", "word", "length"])
def test_a_layout_that_changes_from_call_to_call_is_never_wrong(later):
    torch.manual_seed(0)
    model = two_tasks(Switches())

    def call(x: torch.Tensor, task_ids, **given) -> torch.Tensor:
        return model(input_ids=x, task_ids=task_ids, **given)

    first = {key: type(value)() for key, value in later.items()}
    short, x = tokens(4, 2), tokens(4, 4)
    same_as_alone(lambda x, task_ids: call(x, task_ids, **first), IDS, short)
    alone = torch.cat([call(x[row : row + 1], task, **later) for row, task in enumerate(IDS)])
    torch.testing.assert_close(call(x, IDS, **later), alone, atol=1e-5, rtol=1e-5)  # this very call is followed
    with pytest.raises(ValueError, match="its rows are not the 4 rows of this call"):
        call(x, IDS, **later)


@pytest.mark.parametrize("shape", [(8,), (2, 8), (5, 8)])
def test_a_list_of_a_tensor_for_each_row_is_not_taken_for_tensors_of_all_rows(shape):
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack([self.lin(part).flatten(0, -2).mean(0) for part in parts])

    torch.manual_seed(0)
    model, parts = two_tasks(Bag()), [torch.randn(2, *shape), torch.randn(2, *shape)]
    with pytest.raises(ValueError, match=REFUSED):
        model(parts, task_ids=["rte", "sst2"])
    torch.testing.assert_close(model(parts, task_ids="rte")[1:], model(parts[1:], task_ids="rte"))
