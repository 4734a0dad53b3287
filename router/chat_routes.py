"""The routes that need the chat template or the tokenizer. Added by app.py."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from router.answers import respond
from router.api_answers import ChatAnswerBody
from router.chat import Chat
from router.chat_answer import ChatAnswer
from router.chat_request import ChatBody
from router.event_stream import unless_gone
from router.json_pieces import encode
from router.openapi import Document
from router.tokenize import (
    DetokenizeAnswer,
    DetokenizeBody,
    TokenizeAnswer,
    TokenizeMessages,
    TokenizePrompt,
    TokenizeService,
)
from router.tokenizer import Tokenizer


def add_chat(app: FastAPI, document: Document, chat: Chat, tokenizer: Tokenizer) -> None:
    @app.post("/v1/chat/completions", **document.generation(ChatBody, ChatAnswerBody))
    async def chat_completions(request: Request) -> Response:
        body, choices = await unless_gone(chat.start(await request.body()), request.receive)
        return await respond(request, ChatAnswer(body, choices, tokenizer), stream=bool(body.stream))


def add_tokenize(app: FastAPI, document: Document, service: TokenizeService) -> None:
    @app.post("/tokenize", **document.post(TokenizeAnswer, TokenizePrompt, TokenizeMessages))
    async def tokenize(request: Request) -> Response:
        content = await unless_gone(service.tokenize(await request.body()), request.receive)
        return Response(await encode(content), media_type="application/json")

    @app.post("/detokenize", **document.post(DetokenizeAnswer, DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        content = await unless_gone(service.detokenize(await request.body()), request.receive)
        return Response(await encode(content), media_type="application/json")
