from __future__ import annotations

import pytest

from kvrelay_core.errors import ConfigError, InvalidRequestError, KvRelayError, UnsupportedError
from kvrelay_core.media.url_rules import UrlPlace, UrlRules

RULES = UrlRules(("pics.example.org", "*.cdn.example.org", "odd.example.org:8443"))


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("https://pics.example.org/a.png?b=c#d", UrlPlace("https", "pics.example.org", 443, "/a.png?b=c")),
        ("HTTP://PICS.example.org.:80", UrlPlace("http", "pics.example.org", 80, "/")),
        ("http://x.y.cdn.example.org/", UrlPlace("http", "x.y.cdn.example.org", 80, "/")),
        ("https://odd.example.org:8443/?", UrlPlace("https", "odd.example.org", 8443, "/")),
    ],
)
def test_what_is_allowed_is_taken_apart(url: str, place: UrlPlace) -> None:
    assert RULES.place_of(url) == place


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("https://example.org/", UnsupportedError),
        ("https://cdn.example.org/", UnsupportedError),
        ("https://evilcdn.example.org/", UnsupportedError),
        ("https://pics.example.org.evil.org/", UnsupportedError),
        ("https://pics.example.org:80/", UnsupportedError),
        ("https://pics.example.org:22/", UnsupportedError),
        ("https://odd.example.org/", UnsupportedError),
        ("https://127.0.0.1/", UnsupportedError),
        ("https://[::1]/", UnsupportedError),
        ("https://user@pics.example.org/", UnsupportedError),
        ("https://pics.example.org@evil.org/", UnsupportedError),
        ("https://pics.example.org\\@evil.org/", InvalidRequestError),
        ("ftp://pics.example.org/", UnsupportedError),
        ("file:///etc/passwd", UnsupportedError),
        ("//pics.example.org/", UnsupportedError),
        ("", UnsupportedError),
        ("https:///a.png", InvalidRequestError),
        ("https://./a.png", InvalidRequestError),
        ("https://pics.example.org%2f/", InvalidRequestError),
        ("https://pics.example.org:99999/", InvalidRequestError),
        ("https://[::1/", InvalidRequestError),
        ("https://pics.example.org/a b", InvalidRequestError),
        ("https://pics.example.org/a\r\nHost: evil.org", InvalidRequestError),
        ("https://pics.example.org/ä", InvalidRequestError),
        ("https://ｐics.example.org/", InvalidRequestError),
        ("https://pics.example.org/" + "a" * 8192, InvalidRequestError),
    ],
)
def test_everything_else_is_refused(url: str, error: type[KvRelayError]) -> None:
    with pytest.raises(error) as caught:
        RULES.place_of(url)
    assert type(caught.value) is error and caught.value.metadata["field"] == "media"


def test_a_star_allows_every_name_on_the_schemes_own_port() -> None:
    everywhere = UrlRules(("*",))
    assert everywhere.place_of("https://[2606:4700::1111]/x").text == "https://[2606:4700::1111]:443/x"
    with pytest.raises(UnsupportedError):
        everywhere.place_of("https://example.org:8443/")


def test_redirects_follow_the_same_rules_and_never_leave_https() -> None:
    start = RULES.place_of("https://pics.example.org/a/b")
    assert RULES.redirected(start, "../c?d") == UrlPlace("https", "pics.example.org", 443, "/c?d")
    assert RULES.redirected(start, "//x.cdn.example.org/").host == "x.cdn.example.org"
    for location in ("http://pics.example.org/", "https://evil.org/", "file:///etc/passwd", "//user@pics.example.org/"):
        with pytest.raises(UnsupportedError):
            RULES.redirected(start, location)
    with pytest.raises(InvalidRequestError):
        RULES.redirected(start, "/a b")


@pytest.mark.parametrize("entry", ["", "*.", "*x.org", "a..b", "https://a.org", "a.org/", "a.org:", "a.org:0", "[::1]"])
def test_an_entry_that_is_no_host_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match="media_url_hosts"):
        UrlRules((entry,))
