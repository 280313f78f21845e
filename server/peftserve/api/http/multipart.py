"""A multipart adapter upload, streamed into the store's staging area as it comes; never held in memory."""

from collections.abc import Callable

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from peftserve.adapters.upload import Upload
from peftserve.errors import InvalidRequestError

PARTS = ("config", "weights")


class AdapterForm:
    """Feed it the body; parts `config` and `weights` go to `upload`. Raises `InvalidRequestError` for anything else."""

    def __init__(self, content_type: str, upload: Upload) -> None:
        media_type, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if media_type != b"multipart/form-data" or not boundary:
            raise InvalidRequestError(
                "content-type: send multipart/form-data with the parts config (adapter_config.json) and weights "
                "(adapter_model.safetensors)",
                field="content-type",
            )
        self._writers: dict[str, Callable[[bytes], None]] = {
            "config": upload.write_config,
            "weights": upload.write_weights,
        }
        self._seen: set[str] = set()
        self._write: Callable[[bytes], None] | None = None
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begin,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value_data,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._part_data,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise InvalidRequestError(f"content-type: {error}", field="content-type") from error

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the body."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidRequestError(f"the multipart body is broken: {error}") from error

    def finish(self) -> None:
        """Call at the body's end: raises unless both parts came and the last one is complete."""
        missing = [f"{part}: the part is missing" for part in PARTS if part not in self._seen]
        if not self._ended:
            missing.append("the multipart body ends before its closing boundary")
        if missing:
            raise InvalidRequestError("; ".join(missing), field=missing[0].partition(":")[0], faults=missing)

    def _part_begin(self) -> None:
        self._disposition = b""
        self._write = None

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_value_data(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name not in self._writers:
            raise InvalidRequestError(f"unknown part {name[:64]!r}; the parts are config and weights", field=name[:64])
        if name in self._seen:
            raise InvalidRequestError(f"{name}: the part comes twice", field=name)
        self._seen.add(name)
        self._write = self._writers[name]

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._write is not None:
            self._write(data[start:end])

    def _end(self) -> None:
        self._ended = True
