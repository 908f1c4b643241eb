"""In `generate`: rows as that very `generate` repeats them, and no others."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from rows_alone import same_as_alone, two_tasks
from tiny import llama
from torch import nn

IDS = ["rte", "sst2"]
LAYERS = {
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


def led() -> nn.Module:
    config = tf.LEDConfig(vocab_size=61, attention_window=4, max_encoder_position_embeddings=64, **LAYERS)
    return tf.LEDForConditionalGeneration(config)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_layers_that_see_the_length_first(mode):
    torch.manual_seed(0)
    model = two_tasks(led(), target_modules=["query", "value", "q_proj", "fc1"])
    x = torch.randint(3, 61, (2, 8))

    def encoded(x: torch.Tensor, task_ids) -> torch.Tensor:
        out = model.generate(
            input_ids=x,
            task_ids=task_ids,
            max_new_tokens=2,
            return_dict_in_generate=True,
            output_hidden_states=True,
            **mode,
        )
        hidden = out.encoder_hidden_states[-1]
        return hidden[:: len(hidden) // len(x)]

    same_as_alone(encoded, IDS, x)


def musicgen() -> nn.Module:
    small = {"num_hidden_layers": 1, "hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 4, "vocab_size": 61}
    decoder = tf.MusicgenDecoderConfig(**small, num_codebooks=4, pad_token_id=60, bos_token_id=60)
    text = tf.T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    audio = tf.EncodecConfig(hidden_size=16, num_filters=4, codebook_size=64, codebook_dim=16, num_lstm_layers=1)
    config = tf.MusicgenConfig(text_encoder=text.to_dict(), audio_encoder=audio.to_dict(), decoder=decoder.to_dict())
    return tf.MusicgenForConditionalGeneration(config)


GUIDED = pytest.param(3.0, marks=pytest.mark.transformers_5(reason="cuts what looks like padding out of the codes"))


@pytest.mark.parametrize("scale", [1.0, GUIDED])
def test_classifier_free_guidance_computes_the_batch_twice_over(scale):
    torch.manual_seed(0)
    model = two_tasks(musicgen(), target_modules=r"(decoder|text_encoder).*(q_proj|fc1|q|v)")
    seen: list[torch.Tensor] = []
    hook = model.get_base_model().decoder.register_forward_hook(lambda m, a, o: seen.append(o.logits))

    def logits(x: torch.Tensor, task_ids) -> torch.Tensor:
        seen.clear()
        model.generate(input_ids=x, task_ids=task_ids, max_new_tokens=3, do_sample=False, guidance_scale=scale)
        blocks = seen[0].view(2 if scale > 1 else 1, len(x), -1)
        return blocks.transpose(0, 1)

    same_as_alone(logits, IDS, torch.randint(3, 60, (2, 5)))
    hook.remove()


def test_guidance_of_a_language_model_by_a_call_of_its_own():
    torch.manual_seed(0)
    model = two_tasks(llama())

    def scores(x: torch.Tensor, task_ids) -> torch.Tensor:
        out = model.generate(
            input_ids=x, negative_prompt_ids=x.flip(1), guidance_scale=2.0, task_ids=task_ids, max_new_tokens=2,
            do_sample=False, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        return out.scores[0]

    same_as_alone(scores, IDS, torch.randint(3, 61, (2, 5)))


def whisper() -> nn.Module:
    base = tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            vocab_size=467, num_mel_bins=8, max_source_positions=30, max_target_positions=40, bos_token_id=1,
            decoder_start_token_id=3, begin_suppress_tokens=None, suppress_tokens=None, **LAYERS,
        )
    )  # fmt: skip
    config = base.generation_config
    config.no_timestamps_token_id, config.is_multilingual, config.max_initial_timestamp_index = 450, False, 28
    config.prev_sot_token_id, config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = 5, 0, 2, 3
    return base


@pytest.mark.parametrize(
    "settings", [{"num_beams": 1}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str
)
def test_recordings_that_end_are_not_mistaken_for_those_that_go_on(settings):
    torch.manual_seed(0)
    model = two_tasks(whisper(), target_modules=["q_proj", "v_proj", "fc1"])
    audio = torch.randn(2, 8, 480)
    audio[1, :, 60:] = 0
    mask = torch.tensor([[1] * 480, [1] * 60 + [0] * 420])
    given = {
        "input_features": audio,
        "attention_mask": mask,
        "return_timestamps": True,
        "max_new_tokens": 6,
        **settings,
    }
    with pytest.raises(ValueError, match=r"This `generate` computes \d of its \d rows by themselves|entries but"):
        model.generate(**given, task_ids=IDS)
    assert len(model.generate(**given, task_ids="sst2"))
    short = {**given, "return_timestamps": False, "input_features": audio[:, :, :60], "attention_mask": mask[:, :60]}
    if "do_sample" not in settings:
        assert len(model.generate(**short, task_ids=IDS)) == 2


def test_an_own_generate_that_repeats_rows():
    torch.manual_seed(0)
    config = tf.TimeSeriesTransformerConfig(
        prediction_length=3, context_length=6, lags_sequence=[1, 2], num_time_features=1, num_parallel_samples=3, **{
            key: value for key, value in LAYERS.items() if "token" not in key
        },
    )  # fmt: skip
    model = two_tasks(tf.TimeSeriesTransformerForPrediction(config), target_modules=["q_proj", "v_proj"])
    decoder = model.get_base_model().model.decoder
    seen: list[torch.Tensor] = []
    decoder.register_forward_hook(lambda m, a, o: seen.append(o.last_hidden_state))

    def samples(values: torch.Tensor, past: torch.Tensor, mask: torch.Tensor, future: torch.Tensor, task_ids):
        seen.clear()
        given = {"past_values": values, "past_time_features": past, "past_observed_mask": mask}
        model.generate(**given, future_time_features=future, task_ids=task_ids)
        first = seen[1]  # the first token: later ones are random
        return first.view(len(values), -1)

    same_as_alone(samples, IDS, torch.randn(2, 8), torch.randn(2, 8, 1), torch.ones(2, 8), torch.randn(2, 3, 1))


def test_continuous_batching_takes_the_set_task_only():
    model = two_tasks(llama())
    prompts = [[3, 4, 5], [6, 7]]
    with model.use_task("rte"), pytest.raises(ValueError, match="Continuous batching computes in a thread of its own"):
        model.generate_batch(prompts)
    with pytest.raises(ValueError, match="set_task"):
        model.generate_batch(prompts)


class Repeats(nn.Module):
    """An own `generate` that repeats its rows in its own way."""

    def __init__(self, how) -> None:
        super().__init__()
        self.emb, self.lin, self.how = nn.Embedding(61, 8), nn.Linear(8, 8), how

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.lin(self.emb(input_ids))

    def generate(self, input_ids: torch.Tensor, num_beams: int, ends: bool = False) -> torch.Tensor:
        x = self.how(input_ids, num_beams)
        out = self(x)
        if ends:  # the first row has ended
            return torch.cat([out[:num_beams], self(x[num_beams:])])
        beams = torch.arange(len(x)).view(-1, num_beams).flip(1).flatten()
        return out + 0 * self(x[beams])


def interleaved(x, k):
    return x.repeat_interleave(k, 0)


@pytest.mark.parametrize("how", [interleaved, lambda x, k: x[:, None].expand(-1, k, -1).reshape(-1, x.shape[1])])
def test_an_own_generate_that_repeats_as_transformers_does_is_followed(how):
    torch.manual_seed(0)
    model = two_tasks(Repeats(how))
    same_as_alone(
        lambda x, task_ids: model.generate(x, num_beams=2, task_ids=task_ids)[::2], IDS, torch.tensor([[3, 4], [5, 6]])
    )


@pytest.mark.parametrize("how", [lambda x, k: x.repeat(k, 1), lambda x, k: torch.cat([x] * k)])
def test_an_own_generate_that_repeats_in_another_order_is_refused(how):
    torch.manual_seed(0)
    model, x = two_tasks(Repeats(how)), torch.tensor([[3, 4], [5, 6]])
    for _ in range(2):
        with pytest.raises(ValueError, match="This `generate` is Repeats's own, and the rows"):
            model.generate(x, num_beams=2, task_ids=IDS)
    assert len(model.generate(x, num_beams=2, task_ids="rte")) == 4


@pytest.mark.parametrize("beams", [1, 2])
def test_rows_that_leave_in_the_middle_are_not_mistaken_for_all_rows(beams):
    torch.manual_seed(0)
    model, x = two_tasks(Repeats(interleaved)), torch.tensor([[3, 4], [5, 6]])
    with pytest.raises(ValueError, match=r"computes 2 of its 4 rows by themselves|has 2 entries but the input"):
        model.generate(x, num_beams=beams, ends=True, task_ids=IDS)
    assert len(model.generate(x, num_beams=beams, ends=True, task_ids="sst2")) == 2 * beams
