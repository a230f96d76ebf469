"""`visionzip serve --engine transformers`: the chat handler of transformers' own server on one compressed model.

Its model manager would load the stock class of a directory, and any other model that a client names; here it holds the one model
that was loaded, and only the routes for chat, the list of models and health are there.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

from visionzip.serving.requests import RequestError, check_request

MAX_BODY = 64 * 2**20
"""Bytes of the largest request."""


def serve(arguments: argparse.Namespace, name: str, address: str, curl: str) -> int:
    """Serve until a signal comes.

    Raises:
        ValueError: for a model that can't be loaded.
    """
    import uvicorn

    from visionzip.commands import _model

    plain = argparse.Namespace(**dict.fromkeys(_model.FIELDS), **vars(arguments))
    plain.device, plain.trust_remote_code = None, False
    model, processor = _model.load(plain)
    app = build_app(model, processor, name, arguments.images)
    print(f"{name} is served at {address}  (Ctrl+C ends it). Try it:\n{curl}", flush=True)
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning")
    return 0


def build_app(model: Any, processor: Any, name: str, images: int) -> Any:
    """The ASGI app: ``/v1/chat/completions``, ``/v1/models``, ``/health``."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.utils import GenerationState

    logging.getLogger("transformers").setLevel(logging.ERROR)
    handler = ChatCompletionHandler(
        model_manager=manager(model, processor, name), generation_state=GenerationState(), chat_template_kwargs={}
    )

    def refused(message: str, status: int) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "code": status}}, status)

    async def chat(request: Any) -> Any:
        if int(request.headers.get("content-length") or 0) > MAX_BODY:
            return refused(f"the request is larger than {MAX_BODY:,} bytes", 413)
        try:
            body = check_request(await request.json(), name, images)
        except RequestError as error:
            return refused(str(error), error.status)
        except ValueError as error:
            return refused(f"the body of the request is not JSON: {error}", 400)
        try:
            return await handler.handle_request(body, request.headers.get("x-request-id") or "")
        except HTTPException as error:
            return refused(str(error.detail), error.status_code)
        except (ValueError, TypeError) as error:
            return refused(str(error), 400)

    async def models(request: Any) -> Any:
        return JSONResponse(
            {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "visionzip-ft"}]}
        )

    async def health(request: Any) -> Any:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ]
    )


def manager(model: Any, processor: Any, name: str) -> Any:
    """transformers' model manager, which holds `model` and loads nothing."""
    from transformers.cli.serving.model_manager import ModelManager

    class OneModel(ModelManager):
        def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            return model, processor

    made = OneModel(device=str(model.device))
    made.force_model = name
    return made
