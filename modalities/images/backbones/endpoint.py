"""A classifier behind HTTP: images go out, only logits come back, and whatever else comes back is an error."""

from __future__ import annotations

import http.client
import io
import json
import logging
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import numpy as np
from torch import Tensor

from shared.errors import RequestError, WorkError

PAUSE = 0.5  # seconds before the first retry; doubled for each further one
PASSING = (408, 425, 429, 500, 502, 503, 504)  # states of a server that a retry may find gone
PER_LOGIT = 64  # most bytes of an answer for each number in it
_log = logging.getLogger("omniadapt")


class Endpoint:
    """Calling it posts images and gives logits.

    The request's body is a ``.npy`` file (NumPy's format 1.0) of float32 (B, bands, H, W); the answer is JSON,
    ``{"logits": [[...], ...]}`` with B lists of ``classes`` numbers.
    timeout: seconds without an answer.  retries: further tries where the server cannot be reached, does not answer in
    time, or says that its trouble may pass; each is told in the log.
    """

    def __init__(self, url: str, classes: int, *, timeout: float = 30.0, retries: int = 2):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RequestError(f"model {url!r}: use a URL such as http://HOST:PORT/PATH")
        if not 0 < timeout < float("inf") or retries < 0:
            raise RequestError(f"timeout {timeout} and retries {retries}: use seconds above 0, and 0 or more")
        self.url, self.classes, self.timeout, self.retries = url, classes, timeout, retries

    def __call__(self, images: Tensor) -> np.ndarray:
        """images (B, bands, H, W) to logits (B, classes). Raises WorkError where no such answer comes."""
        file = io.BytesIO()
        np.save(file, images.float().cpu().contiguous().numpy(), allow_pickle=False)
        most = PER_LOGIT * (len(images) * self.classes + 16)
        for tried in range(1, self.retries + 2):
            try:
                answer = self._post(file.getvalue(), most)
                break
            except _Passing as trouble:
                if tried > self.retries:
                    raise WorkError(f"{self.url}: {trouble} (tried {tried} times)") from trouble
                pause = PAUSE * 2 ** (tried - 1)
                _log.warning("%s: %s; try %d of %d in %g s", self.url, trouble, tried + 1, self.retries + 1, pause)
                time.sleep(pause)
        return self._read(answer, len(images), most)

    def _post(self, body: bytes, most: int) -> bytes:
        request = urllib.request.Request(
            self.url, body, {"Content-Type": "application/x-npy", "Accept": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return response.read(most + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = f"the server answers with status {error.code} ({error.reason})"
            if error.code in PASSING:
                raise _Passing(said) from error
            raise WorkError(f"{self.url}: {said}") from error
        except TimeoutError as error:
            raise _Passing(f"no answer within {self.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                raise _Passing(f"no answer within {self.timeout:g} s") from error
            raise _Passing(f"the server cannot be reached or broke off ({reason})") from error

    def _read(self, answer: bytes, images: int, most: int) -> np.ndarray:
        def wrong(what: str) -> WorkError:
            wanted = f'{{"logits": {images} lists of {self.classes} numbers}}'
            return WorkError(f"{self.url}: the answer {what}; it should be JSON, {wanted}")

        if len(answer) > most:
            raise wrong(f"is longer than {most} bytes")
        try:
            told = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise wrong(f"is not JSON ({answer[:40]!r})") from error
        if not isinstance(told, dict) or "logits" not in told:
            raise wrong("holds no logits")
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is told below
                logits = np.array(told["logits"], dtype=np.float64).astype(np.float32)
        except (ValueError, TypeError, OverflowError) as error:
            raise wrong("holds logits that are no table of numbers") from error
        if logits.shape != (images, self.classes):
            raise wrong(f"holds logits of shape {logits.shape}")
        if not np.isfinite(logits).all():
            raise wrong("holds logits that are not finite")
        return logits


class _Passing(Exception):
    """A failure that may be gone at the next try."""
