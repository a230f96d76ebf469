"""Requests for chat completions, checked before a model sees them: images are decoded here, and nothing is fetched for one."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

from visionzip.images import MAX_PIXELS, ImageError, decode_image, enlarge

#: fields that are handed on; others would be ignored, or let a client choose templates and preprocessing
FIELDS = {"model", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream"}
ROLES = ("system", "user", "assistant")


class RequestError(ValueError):
    """A request that can't be answered.

    Attributes:
        status: the HTTP status code, 4xx.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        self.status = status
        super().__init__(message)


def check_request(body: Any, name: str, images: int, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """`body` with each image as an upright RGB PNG, as everything else in this library reads images.

    Args:
        name: the model that is served.
        images: how many a request may contain.

    Raises:
        RequestError: says what is wrong with the request.
    """
    if not isinstance(body, dict):
        raise RequestError("the body of the request is not a JSON object")
    unknown = sorted(set(body) - FIELDS)
    if unknown:
        raise RequestError(f"this server does not know {', '.join(unknown)}; known: {', '.join(sorted(FIELDS))}")
    if "model" not in body:
        raise RequestError(f"the request names no model; this server has {name}")
    if body["model"] != name:
        raise RequestError(f"no model {body['model']!r} here; this server has {name}", 404)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is not a list with at least one message")
    count = [0]
    checked = [_message(message, place, count, images, max_pixels) for place, message in enumerate(messages)]
    return {**body, "messages": checked}


def _message(message: Any, place: int, count: list[int], images: int, max_pixels: int) -> dict[str, Any]:
    where = f"messages[{place}]"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise RequestError(f"{where} is not a message with a role ({', '.join(ROLES)})")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    if not isinstance(content, list):
        raise RequestError(f"{where}.content is neither text nor a list of parts")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image_url":
            count[0] += 1
            if count[0] > images:
                raise RequestError(
                    f"more than {images} images in one request; start the server with --images {images + 1} or more"
                )
            parts.append({"type": "image_url", "image_url": {"url": png_url(part.get("image_url"), where, max_pixels)}})
        else:
            raise RequestError(f"{where} has a part of type {kind!r}; expected text or image_url")
    return {"role": message["role"], "content": parts}


def png_url(given: Any, where: str, max_pixels: int) -> str:
    """A ``data:`` URL of any image → of an upright RGB PNG.

    Raises:
        RequestError: for any other URL, and for what is not an image.
    """
    url = given.get("url") if isinstance(given, dict) else given
    if not isinstance(url, str) or not url.startswith("data:image/"):
        raise RequestError(
            f"{where}: an image comes as a data:image/…;base64,… URL; files and other addresses are not read"
        )
    head, _, data = url.partition(",")
    if not head.endswith(";base64"):
        raise RequestError(f"{where}: the image is not base64-encoded")
    try:
        content = base64.b64decode(data, validate=True)
        image = enlarge(decode_image(content, max_pixels))
    except (binascii.Error, ImageError) as error:
        raise RequestError(f"{where}: the image can't be read: {error}") from error
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
