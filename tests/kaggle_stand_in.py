"""A stand-in for Kaggle's server: what the kaggle program asks it, answered from memory, with
faults on demand.

`python tests/kaggle_stand_in.py` starts one and prints the environment with which the real program
talks to it and to nothing else (requests reach it as a proxy, in absolute form). Standard library
only.
"""

from __future__ import annotations

import io
import json
import re
import socket
import sys
import tarfile
import threading
import time
import zipfile
from base64 import b64decode
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USER, KEY, SIGNATURE = "someone", "k-1f9d-never-print-this", "signature-never-print-this"
# does something to the connection; True if it has answered (or will not)
Fault = Callable[["Handler"], bool]


class ApiError(Exception):
    """Answered as the API does: {"code", "message"} with that status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class StandIn(ThreadingHTTPServer):
    """The server and its state: `models[owner/model][variation]` and `datasets[owner/slug]` are
    lists of versions."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: dict[str, dict[str, list[dict[str, bytes]]]] = {}
        self.datasets: dict[str, list[dict[str, bytes]]] = {}
        # models and datasets; whatever is in self.makes_public becomes one on creation
        self.public: set[str] = set()
        self.makes_public: set[str] = set()
        self.kernels: dict[str, list[dict[str, Any]]] = {}
        self.refused_sources: set[str] = set()
        self.kernel_status = "COMPLETE"  # of the latest run
        self.kernel_failure = ""
        self.output: dict[str, dict[str, bytes]] = {}  # by notebook: files of its newest run
        self.keeps = lambda message: message  # what is kept of a submission's description
        self.submissions: list[dict[str, Any]] = []
        self.allowed_submissions = 5
        self.blobs: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, Any]] = []
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.page_size = 200
        self.dead = False  # every connection is cut
        self.list_lag = 0.0  # seconds until a new version is listed
        self.born: dict[int, float] = {}
        self.lock = threading.RLock()
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def environment(self, home: str) -> dict[str, str]:
        """What makes the kaggle program talk to this server alone; NO_PROXY, ALL_PROXY,
        KAGGLE_API_TOKEN must be unset."""
        return {
            "HOME": home,
            "KAGGLE_USERNAME": USER,
            "KAGGLE_KEY": KEY,
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "http_proxy": f"http://127.0.0.1:{self.server_port}",
            "https_proxy": "http://127.0.0.1:9",
        }

    def fail(self, method: str, *faults: Fault) -> None:
        """The next calls of the method (PUT: uploads) meet these faults, one each."""
        self.faults[method].extend(faults)

    def asked(self, method: str) -> int:
        """How often the method was called."""
        return sum(name == method for name, _ in self.requests)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    # the API, one function a method; they raise ApiError

    def _mine(self, owner: str) -> None:
        if owner != USER:
            raise ApiError(403, "Permission 'models.get' was denied")

    def _model(self, body: dict[str, Any]) -> str:
        name = f"{body['ownerSlug']}/{body['modelSlug']}"
        if name not in self.public:
            self._mine(body["ownerSlug"])
        if name not in self.models:
            raise ApiError(404, "Not found")
        return name

    def _variation(self, body: dict[str, Any]) -> list[dict[str, bytes]]:
        found = self.models[self._model(body)].get(body["instanceSlug"])
        if found is None:
            raise ApiError(404, "Not found")
        return found

    def GetModel(self, body: dict[str, Any]) -> dict[str, Any]:
        name = self._model(body)
        return {
            "id": 1,
            "ref": name,
            "title": "a title",
            "isPrivate": name not in self.public,
            "description": "x",
        }

    def CreateModel(self, body: dict[str, Any]) -> dict[str, Any]:
        self._mine(body["ownerSlug"])
        name = f"{body['ownerSlug']}/{body['slug']}"
        if name in self.models:
            return {"error": "A model with this slug already exists.", "errorCode": 409}
        self.models[name] = {}
        if not body.get("isPrivate") or name in self.makes_public:
            self.public.add(name)
        return {"id": 1, "url": f"https://www.kaggle.com/models/{name}"}

    def CreateModelInstance(self, body: dict[str, Any]) -> dict[str, Any]:
        variations, slug = self.models[self._model(body)], body["body"]["instanceSlug"]
        self._mine(body["ownerSlug"])
        if slug in variations:
            return {"error": "A variation with this slug already exists.", "errorCode": 409}
        variations[slug] = [self._take(body["body"].get("files", []))]
        return {"id": 2, "url": f"https://www.kaggle.com/models/{self._model(body)}"}

    def CreateModelInstanceVersion(self, body: dict[str, Any]) -> dict[str, Any]:
        self._mine(body["ownerSlug"])
        self._variation(body).append(self._take(body["body"].get("files", [])))
        return {"id": 3, "url": f"https://www.kaggle.com/models/{self._model(body)}"}

    def ListModelInstanceVersions(self, body: dict[str, Any]) -> dict[str, Any]:
        listed = self._listed(self._variation(body))
        start = int(body.get("pageToken") or 0)
        rows = [{"versionNumber": n, "isPrivate": True} for n in range(1, listed + 1)][
            start : start + self.page_size
        ]
        more = start + self.page_size < listed
        return {
            "versionList": {"versions": rows},
            "nextPageToken": str(start + self.page_size) if more else "",
        }

    def ListModelInstanceVersionFiles(self, body: dict[str, Any]) -> dict[str, Any]:
        files = self._version(self._variation(body), body)
        return {"files": [{"name": name, "size": len(data)} for name, data in files.items()]}

    def GetDataset(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"currentVersionNumber": self._listed(self._dataset(body))}

    def GetDatasetStatus(self, body: dict[str, Any]) -> dict[str, Any]:
        self._dataset(body)
        return {"status": "READY"}

    def GetDatasetMetadata(self, body: dict[str, Any]) -> dict[str, Any]:
        self._dataset(body)
        private = f"{body['ownerSlug']}/{body['datasetSlug']}" not in self.public
        return {
            "info": {"datasetId": 7, "isPrivate": private, "licenses": [{"name": "apache-2.0"}]}
        }

    def ListDatasetFiles(self, body: dict[str, Any]) -> dict[str, Any]:
        files = self._version(self._dataset(body), body, "datasetVersionNumber")
        return {
            "datasetFiles": [
                {"name": name, "totalBytes": len(data)} for name, data in files.items()
            ]
        }

    def CreateDataset(self, body: dict[str, Any]) -> dict[str, Any]:
        name = f"{body['ownerSlug']}/{body['slug']}"
        if name in self.datasets:
            return {"status": "Error", "error": "The requested slug is in use", "url": ""}
        self.datasets[name] = [self._take(body.get("files", []))]
        if not body.get("isPrivate") or name in self.makes_public:
            self.public.add(name)
        return {"status": "Ok", "url": f"https://www.kaggle.com/datasets/{name}", "ref": name}

    def CreateDatasetVersion(self, body: dict[str, Any]) -> dict[str, Any]:
        self._dataset(body).append(self._take(body["body"].get("files", [])))
        return {"status": "Ok", "url": "https://www.kaggle.com/datasets/x"}

    def _dataset(self, body: dict[str, Any]) -> list[dict[str, bytes]]:
        self._mine(body["ownerSlug"])
        name = f"{body['ownerSlug']}/{body['datasetSlug']}"
        if name not in self.datasets:
            raise ApiError(404, "Not found")
        return self.datasets[name]

    def SaveKernel(self, body: dict[str, Any]) -> dict[str, Any]:
        versions = self.kernels.setdefault(body["slug"], [])
        dropped = {}
        for kind in ("model", "dataset", "competition", "kernel"):
            asked = body.get(f"{kind}DataSources", [])
            dropped[f"invalid{kind.capitalize()}Sources"] = [
                one for one in asked if one in self.refused_sources
            ]
            body[f"{kind}DataSources"] = [one for one in asked if one not in self.refused_sources]
        versions.append(body)
        url = f"https://www.kaggle.com/code/{body['slug']}"
        return {
            "ref": f"/code/{body['slug']}",
            "url": url,
            "versionNumber": len(versions),
            **dropped,
        }

    def GetKernel(self, body: dict[str, Any]) -> dict[str, Any]:
        slug, _, number = body["kernelSlug"].partition("/")
        versions = self.kernels.get(f"{body['userName']}/{slug}")
        number = number or body.get("versionLabel", "").removeprefix("v")  # 2.2.4, 2.2.5
        if not versions or not 1 <= int(number or 1) <= len(versions):
            raise ApiError(404, "Not found")
        held = versions[int(number or len(versions)) - 1]
        keys = (
            "language",
            "kernelType",
            "isPrivate",
            "enableGpu",
            "enableInternet",
            "machineShape",
        )
        sources = [f"{kind}DataSources" for kind in ("model", "dataset", "competition", "kernel")]
        about = {key: held.get(key) for key in keys} | {key: held[key] for key in sources}
        about["enableInternet"] = held.get("enableInternet", False)
        blob = {
            "source": held["text"],
            "language": "python",
            "kernelType": "notebook",
            "slug": slug,
        }
        return {
            "metadata": {"ref": held["slug"], "title": held.get("newTitle"), **about},
            "blob": blob,
        }

    def GetKernelSessionStatus(self, body: dict[str, Any]) -> dict[str, Any]:
        number = body.get("versionLabel", "").removeprefix("v")  # kaggle 2.2.4 sends none
        versions = self.kernels.get(f"{body['userName']}/{body['kernelSlug']}", [])
        old = number and int(number) < len(versions)
        return {
            "status": "COMPLETE" if old else self.kernel_status,
            "failureMessage": self.kernel_failure,
        }

    def ListKernelSessionOutput(self, body: dict[str, Any]) -> dict[str, Any]:
        place = f"{body['userName']}/{body['kernelSlug']}"
        names, start = sorted(self.output.get(place, {})), int(body.get("pageToken") or 0)
        end = start + int(body.get("pageSize") or self.page_size)
        files = [
            {"fileName": name, "url": f"http://localhost/output/{place}/{name}"}
            for name in names[start:end]
        ]
        return {"files": files, "log": "", "nextPageToken": str(end) if end < len(names) else ""}

    def GetSubmissionLimits(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"numToday": len(self.submissions), "numAllowedNow": self.allowed_submissions}

    def ListSubmissions(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"submissions": self.submissions[::-1]}

    def CreateCodeSubmission(self, body: dict[str, Any]) -> dict[str, Any]:
        ref, text = 100 + len(self.submissions), self.keeps(body["submissionDescription"])
        self.submissions.append(
            {
                "ref": ref,
                "description": text,
                "fileName": body["fileName"],
                "version": body["kernelVersion"],
            }
        )
        return {"message": "Successfully submitted", "ref": ref}

    def StartBlobUpload(self, body: dict[str, Any]) -> dict[str, Any]:
        token = f"blob{len(self.blobs)}"
        self.blobs[token] = {
            "name": body["name"],
            "size": int(body.get("contentLength", 0)),
            "data": b"",
        }
        return {
            "token": token,
            "createUrl": f"http://localhost/upload/{token}?upload_id={SIGNATURE}",
        }

    def _take(self, files: list[dict[str, Any]]) -> dict[str, bytes]:
        blobs = [self.blobs[file["token"]] for file in files]
        version = {blob["name"]: blob["data"] for blob in blobs}
        self.born[id(version)] = time.monotonic()
        return version

    def _listed(self, versions: list[dict[str, bytes]]) -> int:
        now = time.monotonic()
        return sum(self.born.get(id(version), 0.0) + self.list_lag <= now for version in versions)

    def _version(
        self, versions: list[dict[str, bytes]], body: dict[str, Any], key: str = "versionNumber"
    ) -> Any:
        number = int(body.get(key) or len(versions))
        if not 1 <= number <= len(versions):
            raise ApiError(404, "Not found")
        return versions[number - 1]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        method = self.path.rsplit("/", 1)[-1]
        self.body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        with self.server.lock:
            self.server.requests.append((method, self.body))
            fault = self.server.faults[method].pop(0) if self.server.faults[method] else None
        if self.server.dead:
            return self.cut()
        if fault is not None and fault(self):
            return
        self.json(*self.answer(method))

    def answer(self, method: str) -> tuple[int, dict[str, Any]]:
        """Status and body of an API call."""
        login = b64decode(self.headers.get("Authorization", "Basic ").split(" ", 1)[1]).decode()
        if login != f"{USER}:{KEY}":
            return 401, {"code": 401, "message": "Unauthenticated"}
        if self.headers.get("Content-Type") != "application/json":
            return 400, {"code": 400, "message": "Content-Type must be application/json"}
        if method.startswith("Download"):
            number = self.body.get("versionNumber") or self.body.get("datasetVersionNumber") or 1
            place = [self.body["ownerSlug"], self.body.get("modelSlug") or self.body["datasetSlug"]]
            place += [self.body.get("instanceSlug") or "-", str(number)]
            kind = "tar.gz" if "Model" in method else "zip"
            return 302, {"location": f"http://localhost/archive/{'/'.join(place)}/a.{kind}"}
        try:
            with self.server.lock:
                return 200, getattr(self.server, method)(self.body)
        except ApiError as error:
            return error.status, {"code": error.status, "message": str(error)}

    def do_GET(self) -> None:
        if found := re.search(r"/output/([^/]+/[^/]+)/(.+)$", self.path):
            return self.reply(200, self.server.output[found[1]][found[2]])
        found = re.search(r"/archive/([^/]+/[^/]+)/([^/]+)/(\d+)/a\.(zip|tar\.gz)$", self.path)
        if not found:
            return self.json(404, {"code": 404, "message": "Not found"})
        name, variation, number, kind = found.groups()
        versions = (
            self.server.datasets[name] if kind == "zip" else self.server.models[name][variation]
        )
        buffer = io.BytesIO()
        if kind == "zip":
            with zipfile.ZipFile(buffer, "w") as archive:
                for file, data in versions[int(number) - 1].items():
                    archive.writestr(file, data)
        else:
            with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
                for file, data in versions[int(number) - 1].items():
                    info = tarfile.TarInfo(file)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        self.reply(200, buffer.getvalue(), {"Content-Type": "application/octet-stream"})

    def do_PUT(self) -> None:
        span = self.headers.get("Content-Range", "")
        with self.server.lock:
            self.server.requests.append(("PUT", span))
            faults = self.server.faults["PROBE" if "*" in span else "PUT"]
            fault = faults.pop(0) if faults else None
        if self.server.dead:
            return self.cut()
        if fault is not None and fault(self):
            return
        self.store(span)

    @property
    def blob(self) -> dict[str, Any]:
        """What an upload goes to."""
        return self.server.blobs[self.path.rsplit("/", 1)[-1].partition("?")[0]]

    def store(self, span: str = "", limit: int | None = None) -> None:
        """Take the body of an upload; no more than `limit` bytes of it, and then the connection
        breaks."""
        blob = self.blob
        if "*" in span and blob.get("expired"):
            return self.reply(404)
        if "*" in span:  # how far did we get?
            if len(blob["data"]) == blob["size"]:
                return self.reply(200)
            got = len(blob["data"])
            return self.reply(308, headers={"Range": f"bytes=0-{got - 1}"} if got else {})
        start = int(re.findall(r"\d+", span)[0]) if span else 0
        length = int(self.headers.get("Content-Length", 0))
        data = self.rfile.read(length if limit is None else min(limit, length))
        blob["data"] = blob["data"][:start] + data
        if limit is not None:
            return self.cut()
        self.reply(200)

    def json(self, status: int, body: dict[str, Any]) -> None:
        headers = {"Content-Type": "application/json", "X-Kaggle-APIVersion": "9.9.9"}
        if "location" in body:
            headers["Location"] = body.pop("location")
        self.reply(status, json.dumps(body).encode(), headers)

    def reply(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def cut(self) -> None:
        """Break the connection without an answer."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def status(code: int, message: str = "", html: bool = False) -> Fault:
    """Answer with an error status instead of doing anything."""

    def fault(handler: Handler) -> bool:
        if html:
            handler.reply(code, b"<html>Bad</html>", {"Content-Type": "text/html"})
        elif handler.command == "PUT":
            handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
            handler.reply(code)
        else:
            handler.json(code, {"code": code, "message": message or f"Error {code}"})
        return True

    return fault


def error_200(message: str, code: int = 409) -> Fault:
    """Answer 200 with an error in the body."""

    def fault(handler: Handler) -> bool:
        handler.json(200, {"error": message, "errorCode": code})
        return True

    return fault


def lost_reply(handler: Handler) -> bool:
    """Do what is asked and break the connection before answering."""
    handler.answer(handler.path.rsplit("/", 1)[-1])
    handler.cut()
    return True


def dies(handler: Handler) -> bool:
    """From now on every connection is cut, until `dead` is reset."""
    handler.server.dead = True
    handler.cut()
    return True


def delay(seconds: float) -> Fault:
    """Do what is asked, late."""

    def fault(handler: Handler) -> bool:
        time.sleep(seconds)
        return False

    return fault


def cut_after(size: int, dead: bool = False) -> Fault:
    """Take so many bytes of an upload and break the connection; with `dead` the server dies
    then."""

    def fault(handler: Handler) -> bool:
        handler.server.dead = dead
        handler.store(handler.headers.get("Content-Range", ""), limit=size)
        return True

    return fault


def altered(change: Callable[[bytes], bytes]) -> Fault:
    """Take an upload, say that it is fine, and keep something else."""

    def fault(handler: Handler) -> bool:
        with handler.server.lock:  # before the version is made
            handler.store(handler.headers.get("Content-Range", ""))
            handler.blob["data"] = change(handler.blob["data"])
        return True

    return fault


if __name__ == "__main__":
    server = StandIn()
    for key, value in server.environment("/tmp/kaggle-stand-in-home").items():
        print(f"export {key}={value}")
    print("unset NO_PROXY no_proxy ALL_PROXY all_proxy KAGGLE_API_TOKEN", flush=True)
    threading.Event().wait()
