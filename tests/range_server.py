"""Serves a folder with byte ranges on a free loopback port, which it prints: `python range_server.py FOLDER [trouble]`.

A process of its own, on one thread, so that it neither shares the interpreter's lock nor much of a core with its clients. It
can be slow, fail, stop short, stall, and ask for tokens that expire; what it does to which request is drawn from a seed.
"""

import argparse
import asyncio
import json
import random
import re
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class Server:
    def __init__(self, asked):
        self.asked, self.random, self.tokens = asked, random.Random(asked.seed), {}
        self.counts = dict.fromkeys(
            (
                "requests",
                "heads",
                "ok",
                "failed",
                "truncated",
                "stalled",
                "refused",
                "peak",
                "bytes",
            ),
            0,
        )
        self.now = 0

    async def client(self, reader, writer):
        try:
            while await self.answer(reader, writer):
                pass
        except (ConnectionError, RuntimeError, asyncio.IncompleteReadError):  # the client left
            pass
        finally:
            writer.close()

    async def answer(self, reader, writer):
        request = await reader.readline()
        if not request.strip():
            return False
        headers = {}
        while (line := await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        method, target, _ = request.decode("latin-1").split(" ", 2)
        parts = urlsplit(target)
        if parts.path == "/counts":
            return await self.send(writer, 200, json.dumps(self.counts).encode())
        if parts.path.startswith("/token/"):
            return await self.send(writer, 200, json.dumps(self.token()).encode())
        self.counts["requests"] += 1
        self.now += 1
        self.counts["peak"] = max(self.counts["peak"], self.now)
        try:
            return await self.file(method, parts, headers, writer)
        finally:
            self.now -= 1

    async def file(self, method, parts, headers, writer):
        asked = self.asked
        await asyncio.sleep(asked.delay)
        if (
            asked.token_life
            and not parts.path.endswith(".parquet")
            and not self.tokens.get(parse_qs(parts.query).get("sig", [""])[0], 0) > time.time()
        ):
            self.counts["refused"] += 1
            return await self.send(writer, 403, b"<Error><Code>AuthenticationFailed</Code></Error>")
        # The index of an archive is spared: what is tried is how its images are read.
        luck = 1.0 if parts.path.endswith(".parquet") else self.random.random()
        if luck < asked.fail:
            self.counts["failed"] += 1
            return await self.send(
                writer,
                asked.status,
                b"busy",
                {"Retry-After": asked.retry_after} if asked.retry_after else {},
            )
        path = Path(asked.folder) / unquote(parts.path).lstrip("/")
        if not path.is_file():
            return await self.send(writer, 404, b"no such key")
        size = path.stat().st_size
        span = (
            re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("range", ""))
            if not asked.no_ranges
            else None
        )
        first, last = (
            (int(span[1] or 0), min(int(span[2] or size), size - 1)) if span else (0, size - 1)
        )
        if span and not span[1]:  # the last so many
            first, last = max(size - int(span[2]), 0), size - 1
        if asked.redirect and "again" not in parse_qs(parts.query):
            return await self.send(
                writer, 302, b"", {"Location": f"{parts.path}?{parts.query}&again=1"}
            )
        if asked.only_before and first >= asked.only_before:
            return await self.send(writer, 404, b"no such key")
        if first >= size:
            return await self.send(writer, 416, b"", {"Content-Range": f"bytes */{size}"})
        length = last - first + 1
        more = {"ETag": f'"{path.stat().st_mtime_ns}"', "Accept-Ranges": "bytes"}
        if span:
            more["Content-Range"] = f"bytes {first}-{last}/{size}"
        luck -= asked.fail
        if luck < asked.truncate:
            self.counts["truncated"] += 1
            body = path.read_bytes()[first : first + length]
            # In turn: the connection breaks off; the answer is short and says so, as some proxies do.
            if self.counts["truncated"] % 2:
                await self.send(
                    writer, 206 if span else 200, body[: len(body) // 2], more, length=len(body)
                )
                return False
            return await self.send(writer, 206 if span else 200, body[: len(body) // 2], more)
        if luck - asked.truncate < asked.stall:
            self.counts["stalled"] += 1
            await asyncio.sleep(asked.stall_s)
        self.counts["ok"] += 1
        self.counts["heads"] += first == 0
        self.counts["bytes"] += length
        await self.send(writer, 206 if span else 200, b"", more, length=length)
        return method == "HEAD" or await self.send_part(writer, path, first, length)

    async def send_part(self, writer, path, first, length):
        """Have the kernel send bytes of a file: this takes half the time on the processor."""
        with path.open("rb") as file:
            await asyncio.get_running_loop().sendfile(writer.transport, file, first, length)
        return True

    def token(self):
        token = secrets.token_hex(8)
        self.tokens[token] = until = time.time() + self.asked.token_life
        return {
            "msft:expiry": datetime.fromtimestamp(until, tz=UTC).isoformat(),
            "token": f"sv=1&sig={token}",
        }

    async def send(self, writer, status, body, more=None, length=None):
        lines = {
            "Content-Length": len(body) if length is None else length,
            "Content-Type": "application/octet-stream",
        }
        head = "".join(f"{k}: {v}\r\n" for k, v in {**lines, **(more or {})}.items())
        writer.write(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + body)
        await writer.drain()
        return True


async def main(asked):
    server = await asyncio.start_server(Server(asked).client, "127.0.0.1", 0, limit=2**20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--delay", type=float, default=0, help="seconds before each answer")
    parser.add_argument("--fail", type=float, default=0, help="share of requests that fail")
    parser.add_argument("--status", type=int, default=503, help="how they fail")
    parser.add_argument("--retry-after", default="", help="what failures say of when to come back")
    parser.add_argument(
        "--truncate", type=float, default=0, help="share of answers that stop short"
    )
    parser.add_argument("--stall", type=float, default=0, help="share of answers that come late")
    parser.add_argument("--stall-s", type=float, default=10, help="how late")
    parser.add_argument(
        "--token-life", type=float, default=0, help="seconds; /token/* gives one, files need one"
    )
    parser.add_argument(
        "--redirect", action="store_true", help="send every request elsewhere first"
    )
    parser.add_argument(
        "--only-before", type=int, default=0, help="ranges from this byte on are not found"
    )
    parser.add_argument(
        "--no-ranges", action="store_true", help="whole files, whatever was asked for"
    )
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(main(parser.parse_args()))
