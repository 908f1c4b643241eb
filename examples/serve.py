"""Serve a task-routed adapter over HTTP: requests for different tasks are answered in one mixed batch.

    python examples/serve.py outputs/multitask              # what `make demo` wrote
    python examples/serve.py my-adapter --max_batch 16      # any saved adapter: a folder or a Hub id

An adapter with a head per task answers with labels (`/classify`), one of an encoder without ranks options (`/rank`),
one of a language model continues a prompt or a chat (`/generate`). `/tasks` lists what a request may name, `/docs` is
the page that tries it out. `/healthz`, `/stats` and `/metrics` (Prometheus text) are for those who keep it running, and
so is `/reload`, which reads the saved adapter again, with the tasks that it has by then.
A wrong request is refused before it gets into a batch; when too many wait, the next one is refused at once, and one
that has waited too long is, too (503). `detail` says why, in a sentence, whatever the error is.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import uvicorn
from answering import ClassifyService, RankService, Service, UnknownTaskError, tasks_of_data
from batching import Batcher, RefusedError
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from generating import GenerateService
from metrics import Measured, registry_of
from peft import PeftConfig, PeftModel
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from train_multitask import MINILM, Arguments, load_encoder
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from peft_poly import PolyConfig

GENERATORS = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM}
SERVED = ("FEATURE_EXTRACTION", "SEQ_CLS", *GENERATORS)
GRACE = 10  # seconds that a server which is told to stop goes on answering


class Problem(BaseModel):
    """What every error answers."""

    detail: str


REFUSALS = {
    404: {"description": "There is no such task; the message has the closest match.", "model": Problem},
    422: {"description": "The request is wrong; the message says where.", "model": Problem},
    500: {"description": "The model failed on this request; the server's log says how.", "model": Problem},
    503: {"description": "Too many requests wait, or for too long, or the server stops. Try again.", "model": Problem},
}


def create_app(service: Service, **batching: Any) -> FastAPI:
    """The application; `batching` has the settings of the `Batcher`."""
    batcher = Batcher(service.run, kind=lambda item: item.task, **batching)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with batcher:
            yield
            service.stopping = True

    app, registry = FastAPI(title="Tasks of one adapter", lifespan=lifespan), registry_of(batcher)
    app.add_middleware(Measured, registry=registry)

    @app.post(service.path, responses=REFUSALS)
    async def answer(request: service.request, http: Request) -> service.answer:
        try:
            item = service.check(request)
        except UnknownTaskError as error:
            raise HTTPException(404, str(error)) from error
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        try:
            return await unless_gone(http, batcher.submit(item))
        except RefusedError as error:
            raise HTTPException(503, str(error), headers={"Retry-After": "1"}) from error
        except asyncio.CancelledError as error:  # by uvicorn, after GRACE
            raise HTTPException(503, "The server is stopping.", headers={"Retry-After": "1"}) from error

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        """Says what is wrong and where, without the input: it may be long, or hold half a character."""
        parts = [f"{'.'.join(map(str, part['loc'][1:])) or 'body'}: {part['msg']}." for part in error.errors()]
        return problem(422, " ".join(parts))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return problem(500, "The server failed on this request; its log says how.")

    @app.get("/tasks")
    async def tasks() -> dict[str, Any]:
        return {"endpoint": service.path, "tasks": [service.describe(task) for task in service.tasks]}

    @app.post("/reload", responses={409: {"description": "The saved adapter cannot be used; nothing changes."}})
    async def reload() -> dict[str, Any]:
        try:
            await batcher.between(service.reload)
        except (OSError, ValueError) as error:
            raise HTTPException(409, str(error)) from error
        return await tasks()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        if not batcher.running:
            raise HTTPException(503, "The server is stopping.")
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/stats")
    async def stats() -> dict[str, int | float]:
        return {**asdict(batcher.stats), "waiting": batcher.waiting, "cpu_seconds": time.process_time()}

    return app


def problem(status: int, detail: str) -> Response:
    """An answer that says what is wrong; `json` escapes what UTF-8 cannot say."""
    return Response(json.dumps({"detail": detail}), status, media_type="application/json")


async def unless_gone(http: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """What `work` returns; it is cancelled when the client hangs up."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HTTPException(499, "The client has hung up.")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


def say(text: str) -> None:
    """Tell who started the server what it does."""
    print(text, file=sys.stderr, flush=True)


def load_service(args: argparse.Namespace) -> Service:
    """The adapter on its base model.

    Raises:
        ValueError: the adapter is of another method or task type, or names no base model; files are missing.
    """
    results = Path(args.adapter) / "results.json"
    trained = json.loads(results.read_text(encoding="utf-8"))["arguments"] if results.exists() else {}
    adapter = f"{args.adapter}/adapter" if results.exists() else args.adapter
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, PolyConfig):
        raise ValueError(f"{adapter} is an adapter of type {config.peft_type.value}; this script serves PEFT_POLY.")
    config.unknown_task = args.unknown_task or config.unknown_task
    name = args.model or trained.get("model") or config.base_model_name_or_path
    if config.task_type not in SERVED:
        allowed = ", ".join(SERVED)
        raise ValueError(f"{adapter} has the task type {config.task_type}; this script serves {allowed}.")
    if not (name or results.exists()):  # what `train_multitask.py` wrote may leave it out, and means MiniLM
        raise ValueError(f"The config of {adapter} names no base model. Pass --model with a Hub id or a folder.")
    say(f"Loading the base model {name or 'MiniLM'}, and the adapter {adapter} ...")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.task_type == "FEATURE_EXTRACTION":
        settings = Arguments(**{**trained, "model": "" if name == MINILM else name})
        base, tokenizer = load_encoder(settings)
        model = PeftModel.from_pretrained(base, adapter, config=config).to(device)

        def known() -> dict[str, Any]:
            return tasks_of_data(args.data or settings.data)

        length = args.max_length or settings.max_length
        return RankService(model, tokenizer, length, settings.temperature, known, adapter)
    if config.task_type == "SEQ_CLS":
        if config.task_labels is None:
            raise ValueError(f"{adapter} has no `task_labels`, so its tasks have no labels to answer with.")
        if config.unknown_task != "error":
            raise ValueError(
                "--unknown_task=mean is not for labels: a task that the adapter does not have has no head."
            )
        base = AutoModelForSequenceClassification.from_pretrained(name)
        model = PeftModel.from_pretrained(base, adapter, config=config).to(device)
        return ClassifyService(model, AutoTokenizer.from_pretrained(name), args.max_length or 512, source=adapter)
    base = GENERATORS[config.task_type].from_pretrained(name, dtype="auto")
    model = PeftModel.from_pretrained(base, adapter, config=config).to(device)
    tokenizer = AutoTokenizer.from_pretrained(name)
    service = GenerateService(model, tokenizer, args.max_length or 512, args.max_new_tokens, adapter)
    if service.chats:
        say("The tokenizer has a chat template: `messages` go through it, `input` is a prompt as it is.")
    return service


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("adapter", help="folder of `train_multitask.py`, or folder or Hub id of a saved adapter")
    add("--model", help="folder or Hub id of the base model (default: the one that the adapter names)")
    add("--data", help="folder of *.jsonl files with the instructions and options of the tasks, to rank")
    add("--device", help="where to compute (default: cuda if there is one, else cpu)")
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=8000, help="port to listen at (default: 8000)")
    add("--max_batch", type=int, default=32, help="most requests of a batch (default: 32)")
    add("--max_wait", type=float, default=5, help="milliseconds that a request waits for company (default: 5)")
    add("--max_queue", type=int, default=256, help="most requests that wait; more are refused (default: 256)")
    add(
        "--max_delay",
        type=float,
        default=30,
        help="seconds that a request waits at most for its batch, then 503 (default: 30)",
    )
    add("--max_length", type=int, help="most tokens of a text (default: as trained, or 512)")
    add("--max_new_tokens", type=int, default=256, help="most tokens that a request may ask for (default: 256)")
    add("--unknown_task", choices=("error", "mean"), help="what a name gets that the adapter lacks (default: as saved)")
    add("--one_task_batches", action="store_true", help="do not mix tasks in a batch, to compare")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        service = load_service(args)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (OSError, ValueError) as error:
        hint = "" if Path(args.adapter).is_dir() else " (`make demo` and `make demo-llm` train one into outputs/.)"
        raise SystemExit(f"error: {error}{hint}") from error
    batching = {"max_batch": args.max_batch, "max_wait": args.max_wait / 1000, "max_queue": args.max_queue}
    try:
        app = create_app(service, **batching, max_delay=args.max_delay, mixed=not args.one_task_batches)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{len(service.tasks)} tasks: {', '.join(map(str, service.tasks))}", flush=True)
    try:
        uvicorn.run(app, host=args.host, port=args.port, timeout_graceful_shutdown=GRACE, access_log=False)
    finally:
        service.stopping = True  # after a second Ctrl-C, which waits for nobody


if __name__ == "__main__":
    main()
