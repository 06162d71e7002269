"""Which URLs may be fetched at all, judged by their text. Knows nothing of addresses: a name says little of those."""

from __future__ import annotations

from urllib.parse import SplitResult, urljoin, urlsplit

from msgspec import Struct

from kvrelay_core.errors import ConfigError, InvalidRequestError, UnsupportedError

_DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_URL_CHARS = 8192


class UrlPlace(Struct, frozen=True):
    """A URL taken apart, once: who asks for it must not parse it again, and perhaps differently."""

    scheme: str  # http or https
    host: str  # in lower case, without brackets
    port: int
    target: str  # path and query

    @property
    def text(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.target}"


class UrlRules:
    def __init__(self, hosts: tuple[str, ...]) -> None:
        """Each of `hosts` is a name, `*.` and a name for all that end so, or `*` for all; its port, if not the
        scheme's own, behind a colon. Raises ConfigError."""
        self._allowed = tuple(map(_read_entry, hosts))

    def place_of(self, url: str) -> UrlPlace:
        """Raises InvalidRequestError for what is no URL, UnsupportedError for one that is not allowed."""
        place = _take_apart(url)
        if not any(_is_named(place, name, port) for name, port in self._allowed):
            raise UnsupportedError(
                f"media: images are not fetched from {place.host} port {place.port}; send the image's bytes, or have "
                "the operator allow the host (--media-url-hosts)",
                field="media",
            )
        return place

    def redirected(self, place: UrlPlace, location: str) -> UrlPlace:
        """Where a redirect leads to; the same rules hold for it."""
        found = self.place_of(urljoin(place.text, location))
        if place.scheme == "https" and found.scheme != "https":
            raise UnsupportedError(f"media: {place.host} redirects from https to http", field="media")
        return found


def _take_apart(url: str) -> UrlPlace:
    # Parsers differ in what they do with blanks and the like: none of them is part of a valid URL.
    if len(url) > _MAX_URL_CHARS or not (url.isascii() and url.isprintable()) or " " in url or "\\" in url:
        raise InvalidRequestError(
            f"media: a URL has at most {_MAX_URL_CHARS} printable ASCII characters and no blank; write others as %XX, "
            "and names as xn--",
            field="media",
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidRequestError(f"media: not a URL: {error}", field="media") from error
    _check_parts(parts)
    assert parts.hostname is not None
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return UrlPlace(parts.scheme, parts.hostname.rstrip("."), port or _DEFAULT_PORTS[parts.scheme], target)


def _check_parts(parts: SplitResult) -> None:
    if parts.scheme not in _DEFAULT_PORTS:
        raise UnsupportedError("media: only http, https and data URLs are taken", field="media")
    if "@" in parts.netloc:
        raise UnsupportedError("media: URLs with a user name are not fetched", field="media")
    if not (parts.hostname or "").rstrip(".") or "%" in (parts.hostname or ""):
        raise InvalidRequestError("media: the URL names no host", field="media")


def _read_entry(entry: str) -> tuple[str, int | None]:
    name, colon, port = entry.lower().rpartition(":")
    if not colon:
        name, port = entry.lower(), ""
    rest = name.removeprefix("*.") if name != "*" else "any"
    if not all(part.replace("-", "").replace("_", "").isalnum() for part in rest.split(".")) or not rest.isascii():
        raise ConfigError(f"media_url_hosts: {entry!r} is not like images.example.org, *.example.org, * or HOST:PORT")
    if colon and not (port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"media_url_hosts: {entry!r} has no port between 1 and 65535 behind the colon")
    return name, int(port) if colon else None


def _is_named(place: UrlPlace, name: str, port: int | None) -> bool:
    if place.port != (port or _DEFAULT_PORTS[place.scheme]):
        return False
    return name in ("*", place.host) or (name.startswith("*.") and place.host.endswith(name[1:]))
