"""Variables of the environment for Hub and network: a wrong one is named at once, with the way out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwq_mlx.errors import SourceError
from qwq_mlx.files.hub.settings import check_network_settings, check_token, connection_advice


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("HF_", "SSL_CERT")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("all_proxy", "socks://127.0.0.1:1", "expected an address that begins with one of http://, "),
        ("https_proxy", '"http://127.0.0.1:7890"', "expected an address"),
        ("https_proxy", "http://127.0.0.1:port", "expected an address"),
        ("http_proxy", "ftp://127.0.0.1:1", "expected an address"),
        ("https_proxy", "socks4://me:secret@127.0.0.1:1", "is 'socks4://...@127.0.0.1:1', expected"),
        ("SSL_CERT_FILE", "/nonexistent.pem", "expected a file of certificates"),
        ("SSL_CERT_FILE", __file__, r"expected a file of certificates in PEM form"),
        ("SSL_CERT_DIR", "/nonexistent", "expected a folder of certificates"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "abc", "expected a whole number of seconds"),
        ("HF_TOKEN_PATH", "/", "expected a file with a token"),
        ("HF_TOKEN", "hf_\u201cabc\u201d", "has '\u201c' as its character 4, expected letters"),
        ("HF_ENDPOINT", "hf-mirror.com", "expected an address such as https://huggingface.co"),
        ("HF_ENDPOINT", "https://", "expected an address such as https://huggingface.co"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SourceError) as caught:
        check_network_settings()
    assert str(caught.value).startswith(f"{name} ") and expected in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_socks_proxy_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"ALL_PROXY is 'socks5h://127\.0\.0\.1:1', and .*pip install socksio"):
        check_network_settings()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    check_network_settings()


def test_what_is_right_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "https_proxy": "http://me:pass@127.0.0.1:7890",
        "http_proxy": "127.0.0.1:7890",
        "no_proxy": "localhost,::1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "30",
        "HF_TOKEN": "hf_abc\n",
        "HF_TOKEN_PATH": str(tmp_path / "not there yet"),
        "HF_ENDPOINT": "https://hf-mirror.com/",
    }.items():
        monkeypatch.setenv(name, value)
    check_network_settings()
    check_token(None, where="HF_TOKEN")


def test_where_no_connection_comes_about_the_variables_that_led_there_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror")
    advice = connection_advice("https://mirror")
    assert "the proxy http://...@127.0.0.1:9 of https_proxy, and HF_ENDPOINT, which is 'https://mirror'" in advice
    assert "proxy" not in connection_advice("http://127.0.0.1")
