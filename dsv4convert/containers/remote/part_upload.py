"""Sending the parts of a file to a store that speaks S3, from several processes, through ``boto3``.

``obstore`` begins and ends such an upload within one call of one process.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import InputMissingError, InputOutputError
from ..destinations import PartsDestination, Sent, SentPart
from ..fetching import TransientError
from .store_upload import ALLOW_HTTP, SHA256_KEY, StoreDestination, allows_http, is_set
from .stores import keys_hint

# In place of the SHA-256 of a file, which nobody knows when its upload begins: the store tells that of its parts.
OF_PARTS = "of-parts"
CHECKSUM = "SHA256"
SECONDS = 600.0
ENDPOINTS = "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"
VIRTUAL_HOSTED = "AWS_VIRTUAL_HOSTED_STYLE_REQUEST"
REFUSED, NOTHING = ("401", "403"), "404"
# Answers that do not pass; but a request with status 400 can have been changed or cut on its way.
LASTING = ("301", "400", "405", "411", "501")
CHANGED = ("BadDigest", "IncompleteBody", "InvalidDigest", "RequestTimeout", "XAmzContentSHA256Mismatch")


class _NotTakenError(InputOutputError):
    """The store does not take a request, and will not."""


class PartsStoreDestination(StoreDestination, PartsDestination):
    """A folder of a bucket of S3."""

    def __init__(self, rest: str) -> None:
        super().__init__("s3", rest)
        self._bucket = rest.partition("/")[0]

    @property
    def _client(self) -> Any:
        """The client, with place and keys from the variables that ``obstore`` takes them from."""
        endpoint = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)
        if endpoint is not None and not endpoint.startswith("https://") and not allows_http():
            raise InputOutputError(
                "the store is not reached by https", where=self.address, hint=f"set {ALLOW_HTTP[0]}=true to send anyway"
            )
        style = "virtual" if is_set(VIRTUAL_HOSTED) else "auto" if endpoint is None else "path"
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        return _client_of(endpoint, region, style, os.environ.get("AWS_ACCESS_KEY_ID"))

    def begin_parts(self, name: str) -> str | None:
        """See ``PartsDestination.begin_parts``."""
        if self._resume and not self._overwrite and self._head(name) is not None:
            return None
        self._check_free_for_parts(name)
        self._drop_uploads(name)
        options = {"ChecksumAlgorithm": CHECKSUM, "Metadata": {SHA256_KEY: OF_PARTS}}
        try:
            begun = self._call("create_multipart_upload", name, **options)
        except _NotTakenError:
            return None
        upload = str(self._value(begun, "UploadId"))
        if begun.get("ChecksumAlgorithm") == CHECKSUM:
            return upload
        self._drop(name, upload)
        return None

    def _check_free_for_parts(self, name: str) -> None:
        """Check that a file may come under its name.

        Raises:
            OutputExistsError: it may not.
        """
        with self._lock:
            self._check_mark()
            if not self._overwrite and self._head(name) is not None:
                raise self._taken(name)

    def _drop_uploads(self, name: str) -> None:
        """Drop what earlier runs have left of a file's parts."""
        with suppress(InputOutputError):
            listed = self._ask_bucket(lambda: self._asked("list_multipart_uploads", Prefix=self._prefix + name), 1)
            for upload in listed.get("Uploads", ()):
                if self._value(upload, "Key") == self._prefix + name:
                    self._drop(name, self._value(upload, "UploadId"))

    def _drop(self, name: str, upload: str) -> None:
        """Drop an upload, as far as the store and these keys allow: readers never see its parts."""
        with suppress(FileNotFoundError, InputOutputError):
            self._ask(lambda: self._asked("abort_multipart_upload", Key=self._prefix + name, UploadId=upload), 1)

    def send_part(self, name: str, upload: str, number: int, path: Path, sent: Sent) -> SentPart:
        """See ``PartsDestination.send_part``; the store refuses bytes that were changed on their way."""

        def send() -> Any:
            with path.open("rb") as body:
                return self._asked(
                    "upload_part",
                    Key=self._prefix + name,
                    UploadId=upload,
                    PartNumber=number,
                    Body=body,
                    ContentLength=sent.size,
                    ChecksumSHA256=_base64(sent.sha256),
                )

        try:
            answer = self._ask(send, name=name)
        except FileNotFoundError:
            raise self._no_upload(name) from None
        return SentPart(sent.size, sent.sha256, self._value(answer, "ETag"))

    def parts_there(self, name: str, upload: str) -> Mapping[int, tuple[int, str]] | None:
        """See ``PartsDestination.parts_there``."""
        found: dict[int, tuple[int, str]] = {}
        after = 0
        try:
            while True:
                page = self._call("list_parts", name, UploadId=upload, PartNumberMarker=after)
                for part in page.get("Parts", ()):
                    number, size, etag = (self._value(part, key) for key in ("PartNumber", "Size", "ETag"))
                    found[number] = size, etag
                if not page.get("IsTruncated"):
                    return found
                before, after = after, int(self._value(page, "NextPartNumberMarker"))
                if after <= before:
                    raise self._meaningless("NextPartNumberMarker")
        except FileNotFoundError:
            return None

    def finish_parts(self, name: str, upload: str, parts: Sequence[SentPart]) -> None:
        """See ``PartsDestination.finish_parts``."""
        self._check_free_for_parts(name)
        told = [
            {"PartNumber": number, "ETag": part.etag, "ChecksumSHA256": _base64(part.sha256)}
            for number, part in enumerate(parts, 1)
        ]
        try:
            self._call("complete_multipart_upload", name, UploadId=upload, MultipartUpload={"Parts": told})
        except FileNotFoundError:  # by an attempt whose answer was lost; what is there is looked at before all is shown
            if self._head(name) is None:
                raise self._no_upload(name) from None

    def _no_upload(self, name: str) -> InputOutputError:
        return InputOutputError(
            "the store has dropped the parts that were sent",
            where=f"{self.address}/{name}",
            hint="run again with --resume; it sends them again",
        )

    def _head(self, name: str) -> Sent | None:
        there = super()._head(name)
        if there is None or there.sha256 != OF_PARTS:
            return there
        try:
            told = self._call("head_object", name, ChecksumMode="ENABLED")
        except FileNotFoundError:  # removed meanwhile
            return None
        value = str(told.get("ChecksumSHA256", "")).partition("-")[0]
        count = str(self._value(told, "ETag")).strip('"').rpartition("-")[2]
        try:
            digest = base64.b64decode(value, validate=True).hex()
        except ValueError:
            raise self._meaningless("ChecksumSHA256") from None
        return Sent(there.size, f"{digest}-{count}")

    def _value(self, answer: Mapping[str, Any], key: str) -> Any:
        """Return a value that an answer must have."""
        if key not in answer:
            raise self._meaningless(key)
        return answer[key]

    def _meaningless(self, key: str) -> InputOutputError:
        return InputOutputError(
            f"the store's answer has no meaningful {key}",
            where=self.address,
            hint="without the package boto3, files are sent whole, by one worker each",
        )

    def _call(self, operation: str, name: str, **options: Any) -> Any:
        """Return the store's answer about an object.

        Raises:
            FileNotFoundError: there is no such object or upload.
            InputOutputError: it cannot be had now.
        """
        return self._ask(lambda: self._asked(operation, Key=self._prefix + name, **options), name=name)

    def _asked(self, operation: str, **options: Any) -> Any:
        with self._errors():
            return getattr(self._client, operation)(Bucket=self._bucket, **options)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise the library's errors as ours: without their texts, which can hold keys."""
        from botocore import exceptions
        from botocore.parsers import ResponseParserError

        passing = (
            exceptions.HTTPClientError,
            exceptions.ConnectionError,
            exceptions.IncompleteReadError,
            exceptions.MetadataRetrievalError,
            exceptions.CredentialRetrievalError,
            ResponseParserError,
        )
        try:
            yield
        except exceptions.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", "")) or "ClientError"
            status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
            if status == NOTHING and code != "NoSuchBucket":
                raise FileNotFoundError from None
            if status in REFUSED:
                hint = keys_hint(self.address)
                raise InputMissingError("the store refuses access", where=self.address, hint=hint) from None
            if status in LASTING and code not in CHANGED:
                raise self._not_taken(f"{code}, HTTP status {status}") from None
            raise TransientError(f"{code}, HTTP status {status}") from None
        except passing as error:
            raise TransientError(type(error).__name__) from None
        except (exceptions.BotoCoreError, ValueError) as error:  # keys, a profile or an endpoint that make no sense
            raise self._not_taken(type(error).__name__) from None

    def _not_taken(self, reason: str) -> _NotTakenError:
        return _NotTakenError(
            f"the store takes no parts of files ({reason})", where=self.address, hint=keys_hint(self.address)
        )


@cache
def _client_of(endpoint: str | None, region: str, style: str, key: str | None) -> Any:
    """Return a client, made once: that takes longer than to send a part. It finds ``key`` and its secret itself."""
    from boto3.session import Session
    from botocore.config import Config

    return Session().client(
        "s3",
        endpoint_url=endpoint,
        region_name=region,
        config=Config(
            read_timeout=SECONDS,
            retries={"total_max_attempts": 1},  # requests are made again as all others are
            s3={"addressing_style": style},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def _base64(digest: str) -> str:
    return base64.b64encode(bytes.fromhex(digest)).decode()
