"""The server of `examples/serve.py`: a mixed batch answers what each request gets alone, and nothing harms the others.

The reference is one text at a time, without padding and without a server. Requests go through the application in this
process; one test starts a server on this machine and ends it while it computes, one starts the script itself.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import peft
import pytest
import torch
import uvicorn
from labelled import LABELS, N_LABELS, NAMES, adapted
from prometheus_client.parser import text_string_to_metric_families
from tiny import TASKS, VOCAB, bert, bert_config, llama, t5
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertModel, PreTrainedTokenizerFast

from peft_poly import PolyConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = [f"w{n}" for n in range(VOCAB - 2)]
OPTIONS = {"rte": ["w1", "w2 w3"], "sst2": ["w4", "w5", "w6 w7 w8"], "boolq": None}
TEXTS = ["w9", "w10 w11 w12 w13", "w14 w15", "w16 w17 w18 w19 w20", "w21 w22", "w23"]
LONG = 200.0


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def row(task: str, options: list[str] | None, i: int) -> dict:
    output = options[i % len(options)] if options else "w1"
    split = ["train", "test"][i % 2]
    instruction = f"w4{TASKS.index(task)}"
    return {
        "task": task, "instruction": instruction, "input": f"w{i}", "output": output, "options": options, "split": split
    }  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each kind of model its base, its adapter, and for the ranker the data and the results of training."""
    root = tmp_path_factory.mktemp("serve")
    bases = {"bert": BertModel(bert_config()), "llama": llama(), "t5": t5()}
    types = {"bert": "FEATURE_EXTRACTION", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
    for name, base in bases.items():
        torch.manual_seed(3)
        for parameter in base.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3  # so that tokens and tasks make a difference
        base.save_pretrained(root / name / "model")
        word_tokenizer().save_pretrained(root / name / "model")
        config = PolyConfig(
            task_type=types[name], task_names=TASKS, r=4, n_skills=3, n_splits=2, lora_alpha=32, init_weights=False,
            target_modules="all-linear",
        )  # fmt: skip
        model = peft.get_peft_model(base, config)
        for key, parameter in model.named_parameters():
            if key.endswith("module_logits"):
                parameter.data = torch.randn_like(parameter) * 4
        model.save_pretrained(root / name / "adapter")
    (root / "data").mkdir()
    for task, options in OPTIONS.items():
        lines = [json.dumps(row(task, options, i)) for i in range(4)]
        (root / "data" / f"{task}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = {"model": str(root / "bert/model"), "data": str(root / "data"), "max_length": 12, "temperature": 0.5}
    (root / "bert" / "results.json").write_text(json.dumps({"arguments": arguments}), encoding="utf-8")
    return root


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("serve")


@pytest.fixture
def service(serve, folders):
    """Makes the service of a kind of model, as the command line would."""

    def make(kind: str, *options: str):
        where = [str(folders / kind)] if kind == "bert" else [str(folders / kind / "adapter")]
        where += [] if kind == "bert" else ["--model", str(folders / kind / "model"), "--max_length", "12"]
        return serve.load_service(serve.parse([*where, "--device", "cpu", "--max_new_tokens", "8", *options]))

    return make


def talk(app, session):
    """What `session(http)` returns, which talks to the application."""

    async def inside():
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as http,
        ):
            return await session(http)

    return asyncio.run(inside())


def post_all(app, path: str, bodies: list[dict]) -> tuple[list[httpx.Response], dict]:
    """The responses to requests that are sent at once, and the stats."""

    async def session(http):
        found = await asyncio.gather(*(http.post(path, json=body) for body in bodies))
        return found, (await http.get("/stats")).json()

    return talk(app, session)


def one_by_one(serve, service, path: str, bodies: list[dict]) -> list[dict]:
    return [post_all(serve.create_app(service, max_batch=1), path, [body])[0][0].json() for body in bodies]


def naive_ranking(folders, body: dict) -> dict[str, float]:
    """Probabilities of the options by cosine over 0.5, one text at a time, without padding."""
    base = BertModel.from_pretrained(folders / "bert/model")
    model = peft.PeftModel.from_pretrained(base, folders / "bert/adapter").eval()

    def embed(text: str) -> torch.Tensor:
        tokens = word_tokenizer()(text, return_tensors="pt")
        return model(tokens["input_ids"], task_ids=body["task"]).last_hidden_state[0].mean(dim=0)

    options = body.get("options") or OPTIONS[body["task"]]
    instruction = body.get("instruction") or f"w4{TASKS.index(body['task'])}"
    text = embed(f"{instruction} {body['input']}")
    with torch.no_grad():
        cosines = torch.stack([torch.cosine_similarity(text, embed(option), dim=0) for option in options])
    return dict(zip(options, torch.softmax(cosines / 0.5, dim=0).tolist(), strict=True))


# ------------------------------------------------------------------------------------------------------------- answers
OWN = {"instruction": "w50", "options": ["w30", "w31 w32", "w33"]}
RANKED = [
    {"task": "sst2", "input": TEXTS[0]},
    {"task": "rte", "input": TEXTS[1]},
    {"task": "boolq", "input": TEXTS[2], **OWN},
    {"task": "rte", "input": TEXTS[3]},
    {"task": "sst2", "input": TEXTS[4], **OWN},
    {"task": "rte", "input": TEXTS[5], **OWN},
]


class TestRanking:
    def test_a_mixed_batch_answers_what_a_naive_loop_does(self, serve, service, folders):
        app = serve.create_app(service("bert"), max_batch=6, max_wait=LONG)
        responses, stats = post_all(app, "/rank", RANKED)
        assert stats.pop("cpu_seconds") > 0
        assert stats == {"answered": 6, "refused": 0, "batches": 1, "kinds": 3, "waiting": 0}
        assert all(isinstance(count, int) for count in stats.values())
        for response, body in zip(responses, RANKED, strict=True):
            wanted = naive_ranking(folders, body)
            assert response.status_code == 200
            assert response.json()["probabilities"] == pytest.approx(wanted, abs=1e-5)
            assert response.json()["answer"] == max(wanted, key=wanted.get)

    def test_the_task_makes_a_difference(self, folders):
        same = [{"task": task, "input": "w9", "options": ["w1", "w2"]} for task in TASKS]
        assert len({round(naive_ranking(folders, body)["w1"], 3) for body in same}) == 3

    def test_vectors_of_options_are_kept_and_forgotten_without_a_change(self, serve, service):
        bert = service("bert")
        alone = one_by_one(serve, service("bert"), "/rank", RANKED)
        bert.KEPT = 2  # fewer than a batch needs
        bert.MOST_ROWS = 3  # a batch takes several forwards
        for _ in range(2):
            app = serve.create_app(bert, max_batch=6, max_wait=LONG)
            responses, _ = post_all(app, "/rank", RANKED)
            for response, wanted in zip(responses, alone, strict=True):
                assert response.json()["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
            assert len(bert._vectors) == 2

    def test_an_option_that_is_known_is_not_computed_again(self, serve, service):
        bert = service("bert")
        rows = []
        bert.model.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        one_by_one(serve, bert, "/rank", [{"task": "rte", "input": "w9"}, {"task": "rte", "input": "w10"}])
        assert rows == [3, 1]

    def test_the_tasks_say_what_a_request_need_not(self, serve, service):
        found = talk(serve.create_app(service("bert")), lambda http: http.get("/tasks")).json()
        assert found["endpoint"] == "/rank"
        assert found["tasks"] == [
            {"task": "rte", "instruction": "w40", "options": ["w1", "w2 w3"]},
            {"task": "sst2", "instruction": "w41", "options": ["w4", "w5", "w6 w7 w8"]},
            {"task": "boolq", "instruction": None, "options": None},
        ]


class TestGeneration:
    @pytest.mark.parametrize("kind", ["llama", "t5"])
    def test_a_mixed_batch_answers_what_each_request_gets_alone(self, serve, service, kind):
        bodies = [
            {"task": task, "input": text, "max_new_tokens": new}
            for task, text, new in zip(TASKS * 2, TEXTS, [3, 8, 5, 8, 1, 4], strict=True)
        ]
        served = service(kind)
        responses, stats = post_all(serve.create_app(served, max_batch=6, max_wait=LONG), "/generate", bodies)
        assert (stats["batches"], stats["kinds"]) == (1, 3)
        outputs = set()
        for response, body in zip(responses, bodies, strict=True):
            tokens = word_tokenizer()(body["input"], return_tensors="pt")
            call = {"task_ids": body["task"], "max_new_tokens": body["max_new_tokens"], "do_sample": False}
            made = served.model.generate(input_ids=tokens["input_ids"], **call)[0]
            start = tokens["input_ids"].shape[1] if kind == "llama" else 0
            wanted = word_tokenizer().decode(made[start:], skip_special_tokens=True)
            assert response.json() == {"output": wanted}
            outputs.add(wanted)
        assert len(outputs) > 3

    def test_messages_of_a_chat_go_through_the_template_and_a_prompt_does_not(self, serve, service, folders, capsys):
        template = "{% for m in messages %}<s> w{{ m['role'] | length }} {{ m['content'] }} {% endfor %}w30"
        service("llama")
        assert "template" not in capsys.readouterr().err
        templates = folders / "llama/model/chat_template.jinja"
        templates.write_text(template, encoding="utf-8")
        try:
            chat = service("llama")
        finally:
            templates.unlink()
        assert "`messages` go through it" in capsys.readouterr().err
        messages = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w10 w11"}]
        bodies = [
            {"task": "rte", "messages": messages, "max_new_tokens": 6},
            {"task": "rte", "input": "<s> w6 w9 <s> w4 w10 w11 w30", "max_new_tokens": 6},
            {"task": "rte", "input": "w10 w11", "max_new_tokens": 6},
        ]
        responses, _ = post_all(serve.create_app(chat), "/generate", bodies)
        found = [response.json()["output"] for response in responses]
        assert found[0] == found[1] != found[2]

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({}, "Pass `input`, a prompt as it is, or `messages`"),
            ({"input": "w1", "messages": [{"role": "user", "content": "w1"}]}, "Pass `input`"),
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "boss", "content": "w1"}]}, "messages.0.role"),
            ({"messages": [{"role": "system", "content": "w1"}]}, "must be the user's"),
            ({"messages": [{"role": r, "content": "w1"} for r in ("user", "assistant")]}, "must be the user's"),
            ({"messages": [{"role": "user", "content": " "}]}, "messages.0.content: The text is blank"),
            ({"messages": [{"role": "user", "content": "w1"}], "max_new_tokens": 2}, "has no chat template"),
        ],
        ids=["neither", "both", "none", "role", "no question", "answered", "blank", "no template"],
    )
    def test_what_is_neither_a_prompt_nor_a_chat_is_refused(self, serve, service, body, message):
        app = serve.create_app(service("llama"))
        (response,), _ = post_all(app, "/generate", [{"task": "rte", **body}])
        assert response.status_code == 422
        assert message in response.json()["detail"]

    def test_messages_that_the_template_refuses_are_422(self, serve, service):
        served = service("llama")
        served.tokenizer.chat_template = "{{ raise_exception('Roles must alternate') }}"
        body = {"task": "rte", "messages": [{"role": "user", "content": "w1"}], "max_new_tokens": 2}
        (response,), _ = post_all(serve.create_app(served), "/generate", [body])
        assert response.status_code == 422
        assert "Roles must alternate" in response.json()["detail"]

    def test_more_tokens_than_positions_are_refused_at_the_start(self, service):
        with pytest.raises(ValueError, match="64 positions, too few for 60 tokens of a text and 8 new ones"):
            service("llama", "--max_length", "60")

    def test_more_tokens_than_allowed_are_refused(self, serve, service):
        body = {"task": "rte", "input": "w1", "max_new_tokens": 9}
        (response,), _ = post_all(serve.create_app(service("llama")), "/generate", [body])
        assert response.status_code == 422
        assert "`max_new_tokens` may be 8 at most, got 9" in response.json()["detail"]


# --------------------------------------------------------------------------------------- unknown tasks, tasks that come
class TestTasksThatTheAdapterHasNotSeen:
    def test_a_stranger_gets_the_mean_row_where_that_is_set(self, serve, service, folders):
        body = {"task": "somebody new", "input": TEXTS[0], **OWN}
        app = serve.create_app(service("bert", "--unknown_task", "mean"))
        (found, known), _ = post_all(app, "/rank", [body, RANKED[0]])
        model = peft.PeftModel.from_pretrained(
            BertModel.from_pretrained(folders / "bert/model"), folders / "bert/adapter", is_trainable=True
        )
        model.add_tasks(["somebody new"], init="mean")
        grown = folders / "grown"
        model.save_pretrained(grown / "bert" / "adapter")
        (grown / "bert" / "model").symlink_to(folders / "bert" / "model")
        assert found.json()["probabilities"] == pytest.approx(naive_ranking(grown, body), abs=1e-5)
        assert known.json()["probabilities"] == pytest.approx(naive_ranking(folders, RANKED[0]), abs=1e-5)

    def test_a_stranger_without_options_is_asked_for_them(self, serve, service):
        app = serve.create_app(service("bert", "--unknown_task", "mean"))
        (response,), _ = post_all(app, "/rank", [{"task": "somebody new", "input": TEXTS[0]}])
        assert response.status_code == 422
        assert "has no options of its own" in response.text

    @pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
    def test_a_saved_adapter_with_more_tasks_is_taken_without_a_restart(self, serve, service, folders, tmp_path, kind):
        body = {"task": "sst2", "input": TEXTS[0], **({} if kind == "bert" else {"max_new_tokens": 6})}
        new = {**body, "task": "cb", **({**OWN, "instruction": "w50"} if kind == "bert" else {})}
        grown = service(kind).model
        grown.add_tasks(["cb"], init="rte")
        grown.save_pretrained(tmp_path)
        served = service(kind)
        app = serve.create_app(served)

        async def session(http):
            before = await http.post(served.path, json=body)
            missing = await http.post(served.path, json=new)
            served.source = str(tmp_path)
            told = await http.post("/reload")
            again = await http.post("/reload")
            after = await http.post(served.path, json=body)
            found, like = [await http.post(served.path, json={**new, "task": task}) for task in ("cb", "rte")]
            return before, missing, told, again, after, found, like

        before, missing, told, again, after, found, like = talk(app, session)
        assert missing.status_code == 404
        assert [task["task"] for task in told.json()["tasks"]] == [*TASKS, "cb"]
        assert told.json() == again.json()
        assert before.status_code == 200
        assert before.json() == after.json()
        assert found.status_code == 200
        assert found.json() == like.json()
        assert list(served.model.peft_config) == [served.model.active_adapter]

    def test_a_saved_adapter_that_does_not_fit_changes_nothing(self, serve, service, folders, tmp_path):
        served = service("bert")
        app = serve.create_app(served)
        PolyConfig(task_type="CAUSAL_LM", task_names=["x"]).save_pretrained(tmp_path)
        (tmp_path / "torn").mkdir()
        PolyConfig(task_type="FEATURE_EXTRACTION", task_names=["x"]).save_pretrained(tmp_path / "torn")

        async def session(http):
            before = await http.post("/rank", json=RANKED[0])
            refused = []
            for place in (tmp_path, tmp_path / "torn", tmp_path / "nothing"):
                served.source = str(place)
                refused.append(await http.post("/reload"))
            return before, refused, await http.post("/rank", json=RANKED[0])

        before, refused, after = talk(app, session)
        assert [response.status_code for response in refused] == [409] * 3
        assert before.json() == after.json()
        assert served.tasks == TASKS
        assert list(served.model.peft_config) == ["default"]


# -------------------------------------------------------------------------------------------------------------- errors
GOOD = {"task": "rte", "input": "w1"}


class TestRefusals:
    def test_an_unknown_task_gets_the_closest_match(self, serve, service):
        (response,), _ = post_all(serve.create_app(service("bert")), "/rank", [{**GOOD, "task": "sst-2"}])
        assert response.status_code == 404
        assert "Unknown task 'sst-2'. Did you mean 'sst2'?" in response.json()["detail"]

    @pytest.mark.parametrize(("task", "status"), [(0, 200), (2, 422), (3, 404), (-1, 404), (True, 422), ("", 404)])
    def test_a_task_may_be_an_id(self, serve, service, task, status):
        (response,), _ = post_all(serve.create_app(service("bert")), "/rank", [{**GOOD, "task": task}])
        assert response.status_code == status  # task 2 exists, and has no options of its own

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"input": ""}, "at least 1 character"),
            ({"input": None}, "valid string"),
            ({"input": " \n\t"}, "input: The text is blank"),
            ({"input": "\u200b\u00a0"}, "input: The text is blank"),
            ({"input": "w1 " * 12}, "The text has 13 tokens; 1 to 12 are allowed"),
            ({"input": "w" * 20_001}, "at most 20000 characters"),
            ({"options": ["w1"]}, "at least 2 items"),
            ({"options": ["w1", "w1"]}, "Every option may be there once"),
            ({"options": ["w1", " "]}, "The option has 0 tokens"),
            ({"task": "boolq"}, "no options of its own"),
            ({"optoins": ["w1", "w2"]}, "Extra inputs"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
    )
    def test_a_bad_request_says_what_is_wrong(self, serve, service, change, message):
        (response,), _ = post_all(serve.create_app(service("bert")), "/rank", [{**GOOD, **change}])
        assert response.status_code == 422
        assert message in response.text

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
    def test_what_is_no_json_is_refused_too(self, serve, service, content):
        self.refused(serve, service, content)

    @pytest.mark.parametrize(
        "change", [{"input": "\ud800"}, {"task": "\ud800"}, {"\ud800": 1}, {"options": ["\ud800", "w"]}], ids=ascii
    )
    def test_half_a_character_is_refused_and_not_sent_back(self, serve, service, change):
        self.refused(serve, service, json.dumps({**GOOD, **change}).encode())

    @staticmethod
    def refused(serve, service, content):
        headers = {"content-type": "application/json"}
        app = serve.create_app(service("bert"))
        response = talk(app, lambda http: http.post("/rank", content=content, headers=headers))
        assert response.status_code in (400, 422)
        assert response.json()["detail"]

    def test_every_error_says_what_is_wrong_in_a_sentence(self, serve, service):
        app = serve.create_app(service("bert"))
        requests = [
            ("POST", "/rank", {"json": {**GOOD, "task": "no"}}, 404),
            ("POST", "/rank", {"json": {"task": 1.5, "extra": 1}}, 422),
            ("POST", "/rank", {"json": {**GOOD, "options": ["w1", 2]}}, 422),
            ("POST", "/rank", {"content": b"{", "headers": {"content-type": "application/json"}}, 422),
            ("POST", "/rank", {}, 422),
            ("GET", "/rank", {}, 405),
            ("GET", "/nothing", {}, 404),
        ]

        async def session(http):
            return [await http.request(method, path, **more) for method, path, more, _ in requests]

        for response, (*_, status) in zip(talk(app, session), requests, strict=True):
            assert response.status_code == status
            assert list(response.json()) == ["detail"]
            assert isinstance(response.json()["detail"], str)
        schema = app.openapi()["paths"]["/rank"]["post"]["responses"]
        for status in ("404", "422", "500", "503"):
            assert schema[status]["content"]["application/json"]["schema"]["$ref"].endswith("/Problem")

    def test_a_bad_request_leaves_those_beside_it_alone(self, serve, service):
        wanted = one_by_one(serve, service("bert"), "/rank", [GOOD])[0]
        bodies = [GOOD, {**GOOD, "task": "no"}, {"task": "rte"}, GOOD]
        responses, stats = post_all(serve.create_app(service("bert"), max_batch=2, max_wait=LONG), "/rank", bodies)
        assert [response.status_code for response in responses] == [200, 404, 422, 200]
        for response in (responses[0], responses[3]):
            assert response.json()["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
        assert (stats["answered"], stats["batches"]) == (2, 1)

    def test_a_failure_in_the_model_is_an_error_of_that_request_only(self, serve, service):
        bert = service("bert")
        run = bert.run
        unknown = bert.tokens("text", "w50")[0]
        bert.run = lambda items: 1 / 0 if any(unknown in item.tokens for item in items) else run(items)
        app = serve.create_app(bert, max_batch=3, max_wait=LONG)

        async def session():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            client = httpx.AsyncClient(transport=transport, base_url="http://x")
            async with app.router.lifespan_context(app), client as http:
                bodies = [GOOD, {**GOOD, "input": "w50"}, GOOD]
                return await asyncio.gather(*(http.post("/rank", json=body) for body in bodies))

        responses = asyncio.run(session())
        assert [response.status_code for response in responses] == [200, 500, 200]
        assert responses[1].json() == {"detail": "The server failed on this request; its log says how."}

    def test_when_too_many_wait_the_next_is_refused_and_told_to_come_back(self, serve, service):
        bert = service("bert")
        run, entered, gate = bert.run, threading.Event(), threading.Event()

        def held(items):
            entered.set()
            assert gate.wait(LONG)
            return run(items)

        bert.run = held

        async def session(http):
            tasks = [asyncio.create_task(http.post("/rank", json=GOOD))]
            await asyncio.to_thread(entered.wait, LONG)
            tasks.append(asyncio.create_task(http.post("/rank", json=GOOD)))
            while (await http.get("/stats")).json()["waiting"] < 1:  # the loop is free while the model computes
                await asyncio.sleep(0)
            refused = await http.post("/rank", json=GOOD)
            assert (await http.get("/healthz")).status_code == 200
            gate.set()
            return refused, [response.status_code for response in await asyncio.gather(*tasks)]

        refused, statuses = talk(serve.create_app(bert, max_queue=1, max_wait=0), session)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert "1 requests wait already" in refused.json()["detail"]
        assert statuses == [200, 200]

    def test_one_that_has_waited_too_long_is_told_to_come_back(self, serve, service):
        bert, gate = service("bert"), threading.Event()
        run, entered = bert.run, threading.Event()

        def held(items):
            entered.set()
            assert gate.wait(LONG)
            return run(items)

        bert.run = held

        async def session(http):
            first = asyncio.create_task(http.post("/rank", json=GOOD))
            await asyncio.to_thread(entered.wait, LONG)
            late = await http.post("/rank", json=GOOD)
            gate.set()
            return await first, late

        first, late = talk(serve.create_app(bert, max_wait=0, max_delay=0.001), session)
        assert (first.status_code, late.status_code) == (200, 503)
        assert int(late.headers["retry-after"]) >= 1
        assert "has waited for 0.001 s" in late.json()["detail"]


class TestMetrics:
    def test_they_count_requests_by_route_and_status_and_what_the_batcher_did(self, serve, service):
        app = serve.create_app(service("bert"), max_batch=2, max_wait=LONG)

        async def session(http):
            await asyncio.gather(*(http.post("/rank", json={**GOOD, "task": task}) for task in ("rte", "sst2", "no")))
            await http.get("/made-up")
            return await http.get("/metrics")

        response = talk(app, session)
        assert response.headers["content-type"].startswith("text/plain")
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }
        assert found["serve_request_seconds_count", "/rank", "200"] == 2
        assert found["serve_request_seconds_count", "/rank", "404"] == 1
        assert found["serve_request_seconds_count", "other", "404"] == 1
        assert found["serve_answered_total",] == 2
        assert (found["serve_batches_total",], found["serve_batch_tasks_total",]) == (1, 2)
        assert (found["serve_refused_total",], found["serve_waiting",]) == (0, 0)
        assert found["process_cpu_seconds_total",] > 0


class TestClassifying:
    @pytest.fixture
    def options(self, tmp_path):
        adapted().save_pretrained(tmp_path / "adapter")
        model = adapted().merge_and_unload(task="topic")
        model.save_pretrained(tmp_path / "base")  # merged, for a base that differs
        word_tokenizer().save_pretrained(tmp_path / "base")
        places = [str(tmp_path / "adapter"), "--model", str(tmp_path / "base")]
        return [*places, "--device", "cpu", "--max_length", "12"]

    def test_a_mixed_batch_answers_with_the_labels_of_each_task(self, serve, options):
        service = serve.load_service(serve.parse(options))
        bodies = [{"task": task, "input": text} for task, text in zip(NAMES * 2, TEXTS[:4] + TEXTS[2:], strict=True)]
        found, stats = post_all(serve.create_app(service, max_batch=8, max_wait=LONG), "/classify", bodies)
        assert stats["batches"] == 1
        for body, answer in zip(bodies, (one.json() for one in found), strict=True):
            size = N_LABELS[NAMES.index(body["task"])]
            tokens = word_tokenizer()(body["input"], return_tensors="pt")["input_ids"]
            logits = service.model(tokens, task_ids=body["task"]).logits[0, :size]
            if body["task"] == "stars":
                assert answer["value"] == pytest.approx(logits.item(), rel=1e-3)
                assert answer["labels"] is answer["probabilities"] is None
                continue
            several = body["task"] == "genres"
            chances = logits.sigmoid() if several else logits.softmax(0)
            assert list(answer["probabilities"].values()) == pytest.approx(chances.tolist(), rel=1e-3)
            names = list(answer["probabilities"])
            likely = [name for name, chance in zip(names, chances, strict=True) if chance > 0.5]
            assert answer["labels"] == (likely if several else [names[int(chances.argmax())]])
        tasks = talk(serve.create_app(service), lambda http: http.get("/tasks")).json()["tasks"]
        assert tasks[0] == {"task": "sentiment", "kind": "single_label", "labels": LABELS["sentiment"]}
        assert tasks[2] == {"task": "stars", "kind": "regression", "labels": None}

    def test_a_saved_adapter_with_more_tasks_is_taken_with_their_labels(self, serve, options, tmp_path):
        served = serve.load_service(serve.parse(options))
        grown = serve.load_service(serve.parse(options)).model
        grown.add_tasks(["length"], labels={"length": ["short", "long"]})
        grown.remove_tasks("sentiment")
        grown.save_pretrained(tmp_path / "grown")
        app = serve.create_app(served)

        async def session(http):
            before = await http.post("/classify", json={"task": "topic", "input": TEXTS[0]})
            served.source = str(tmp_path / "grown")
            told = [await http.post("/reload"), await http.post("/reload")]
            tasks = ("topic", "length", "sentiment")
            return before, told, [await http.post("/classify", json={"task": t, "input": TEXTS[0]}) for t in tasks]

        before, told, (same, new, gone) = talk(app, session)
        assert [one.status_code for one in (before, *told, same, new, gone)] == [200, 200, 200, 200, 200, 404]
        assert before.json()["labels"] == same.json()["labels"]
        assert list(new.json()["probabilities"]) == ["short", "long"]

    def test_a_name_that_would_be_let_in_has_no_labels(self, serve, options):
        with pytest.raises(SystemExit, match="a task that the adapter does not have has no head"):
            serve.main([*options, "--unknown_task", "mean"])


class TestLoading:
    def test_an_adapter_of_another_method_is_refused(self, serve, tmp_path):
        peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
        with pytest.raises(SystemExit, match=r"adapter of type LORA; this script serves PEFT_POLY"):
            serve.main([str(tmp_path)])

    def test_an_adapter_that_this_cannot_serve_is_refused(self, serve, tmp_path):
        peft.get_peft_model(llama(), PolyConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
        with pytest.raises(SystemExit, match="type None; this script serves FEATURE_EXTRACTION, SEQ_CLS, CAUSAL_LM"):
            serve.main([str(tmp_path)])

    def test_an_adapter_of_a_classifier_without_heads_per_task_is_refused(self, serve, tmp_path):
        model = peft.get_peft_model(bert(), PolyConfig(task_type="SEQ_CLS", target_modules=["query"], n_tasks=2))
        model.save_pretrained(tmp_path)
        with pytest.raises(SystemExit, match="has no `task_labels`"):
            serve.main([str(tmp_path), "--model", "base"])

    @pytest.mark.parametrize("task_type", ["FEATURE_EXTRACTION", "CAUSAL_LM"])
    def test_an_adapter_that_names_no_base_model_asks_for_one(self, serve, tmp_path, task_type):
        base = BertModel(bert_config()) if task_type == "FEATURE_EXTRACTION" else llama()
        model = peft.get_peft_model(base, PolyConfig(task_type=task_type, target_modules="all-linear", n_tasks=2))
        model.save_pretrained(tmp_path)
        message = r"^error: The config of \S+ names no base model\. Pass --model with a Hub id or a folder\.$"
        with pytest.raises(SystemExit, match=message):
            serve.main([str(tmp_path)])

    def test_a_folder_without_an_adapter_is_an_error_and_no_traceback(self, serve, tmp_path):
        with pytest.raises(SystemExit, match=r"error: .*adapter_config\.json"):
            serve.main([str(tmp_path)])


# ---------------------------------------------------------------------------------------------------------- a real one
class TestServer:
    def test_a_server_that_is_stopped_answers_what_it_has_taken(self, serve, service):
        bert = service("bert")
        run, entered, gate = bert.run, threading.Event(), threading.Event()

        def held(items):
            entered.set()
            assert gate.wait(LONG)
            return run(items)

        bert.run = held
        config = uvicorn.Config(serve.create_app(bert, max_wait=0), port=0, log_level="error")
        server, started, found = uvicorn.Server(config), threading.Event(), []
        startup = server.startup

        async def announced(*args, **kwargs):
            await startup(*args, **kwargs)
            started.set()

        server.startup = announced
        thread = threading.Thread(target=server.run)
        thread.start()
        assert started.wait(LONG)
        port = server.servers[0].sockets[0].getsockname()[1]
        address = f"http://127.0.0.1:{port}/rank"
        client = threading.Thread(target=lambda: found.append(httpx.post(address, json=GOOD, timeout=LONG)))
        client.start()
        assert entered.wait(LONG)
        server.should_exit = True
        gate.set()
        client.join(LONG)
        thread.join(LONG)
        assert found[0].status_code == 200
        assert not thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            httpx.post(address, json=GOOD)

    def test_requests_whose_clients_have_gone_hold_nothing_up(self, serve, service):
        bert = service("bert")
        run, entered, gate, computed = bert.run, threading.Event(), threading.Event(), []

        def held(items):
            computed.append(len(items))
            entered.set()
            assert gate.wait(LONG)
            return run(items)

        bert.run = held

        async def session(http):
            tasks = [asyncio.create_task(http.post("/rank", json=GOOD))]
            await asyncio.to_thread(entered.wait, LONG)
            tasks += [asyncio.create_task(http.post("/rank", json=GOOD)) for _ in range(5)]
            while (await http.get("/stats")).json()["waiting"] < 5:
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            gate.set()

        talk(serve.create_app(bert, max_batch=1, max_wait=0), session)
        assert computed == [1]

    def test_ctrl_c_ends_the_script_without_a_traceback_though_clients_have_gone(self, folders):
        where = [str(folders / "llama/adapter"), "--model", str(folders / "llama/model"), "--device", "cpu"]
        sizes = ["--max_length", "12", "--max_new_tokens", "50", "--max_batch", "1", "--port", "0"]
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "serve.py"), *where, *sizes],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            lines = []
            while not (found := re.search(r"running on http://127\.0\.0\.1:(\d+)", lines[-1] if lines else "")):
                lines.append(process.stderr.readline())
                assert lines[-1], "".join(lines)
            body = json.dumps({"task": "rte", "input": "w1", "max_new_tokens": 50}).encode()
            head = (
                f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            )
            for _ in range(30):
                with socket.create_connection(("127.0.0.1", int(found[1]))) as client:
                    client.sendall(head.encode() + b"\r\n\r\n" + body)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=LONG)
        finally:
            process.kill()
        said = "".join(lines) + err
        assert process.returncode == 0, said
        assert "Traceback" not in said
        assert "Loading the base model" in said
        assert out == "3 tasks: rte, sst2, boolq\n"

    def test_the_script_serves_a_load_test_and_ends_when_told_to(self, monkeypatch, folders):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        load_test = importlib.import_module("load_test")
        with load_test.server([str(folders / "bert"), "--device", "cpu"], threads=1) as address:
            assert httpx.get(f"{address}/healthz").json() == {"status": "ok"}
            assert "/rank" in httpx.get(f"{address}/openapi.json").json()["paths"]
            figures = asyncio.run(load_test.load(address, str(folders / "data"), n=30, clients=4, seconds=LONG))
        assert len(figures.latencies) == 30
        assert figures.failures == 10  # those of the task that has no options of its own
        assert 5 <= figures.batches <= 20
        assert figures.kinds <= 20
        assert figures.cpu_seconds > 0
        with pytest.raises(httpx.ConnectError):  # it has ended
            httpx.get(f"{address}/healthz")

    def test_a_server_that_does_not_start_says_why(self, monkeypatch, tmp_path):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        load_test = importlib.import_module("load_test")
        monkeypatch.setattr(load_test.sys, "executable", "false")
        with pytest.raises(SystemExit, match="did not start"), load_test.server([str(tmp_path)], threads=1):
            pass
