"""What a shell may have set for the Hub and the network, checked before the first connection.

httpx and huggingface_hub read these variables themselves, and end in a traceback, or in a long wait, over one that is
wrong. Here each wrong one is named, with the way out.

Does not: change a setting, or check what is right in form but leads nowhere (a connection finds that).
"""

from __future__ import annotations

import importlib.util
import os
import re
import ssl
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from qwq_mlx.errors import SourceError

__all__ = ["check_network_settings", "check_token", "connection_advice"]

_NUMBERS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_PROXIES = ("http", "https", "all")
_SOCKS = ("socks5", "socks5h")


def check_network_settings() -> None:
    """Raises SourceError naming the first variable that cannot be honoured. Imports nothing of huggingface_hub."""
    for name in _NUMBERS:
        if (value := os.environ.get(name)) and not (value.isascii() and value.strip().isdecimal()):
            raise _wrong(name, value, "a whole number of seconds")
    if (endpoint := os.environ.get("HF_ENDPOINT")) and not _is_address(endpoint, ("http", "https")):
        raise _wrong("HF_ENDPOINT", endpoint, "an address such as https://huggingface.co")
    for name in _TOKENS:
        check_token(os.environ.get(name), where=name)
    path = os.environ.get("HF_TOKEN_PATH")
    if path and Path(path).expanduser().exists() and not Path(path).expanduser().is_file():
        raise _wrong("HF_TOKEN_PATH", path, "a file with a token")
    _check_certificates()
    for scheme, proxy in getproxies().items():
        if scheme in _PROXIES and proxy:
            _check_proxy(_variable(f"{scheme}_proxy"), proxy)


def check_token(token: str | None, *, where: str) -> None:
    """Raises SourceError for a token with a character that no header can hold, such as a curly quote.

    where: the variable or file that holds it. The token itself is not shown.
    """
    for place, letter in enumerate((token or "").strip(), start=1):
        if not "!" <= letter <= "~":
            raise SourceError(
                f"{where} has {letter!r} as its character {place}, expected letters, digits and underscores alone. "
                "Copy the token again, without quotes."
            )


def connection_advice(url: str) -> str:
    """What to do where no connection comes about, with the variables that decide where it goes."""
    proxies = getproxies()
    scheme = next((each for each in (urlsplit(url).scheme, "all") if proxies.get(each)), None)
    advice = "Check the network"
    if scheme is not None:
        advice += f" and the proxy {_without_password(proxies[scheme])} of {_variable(f'{scheme}_proxy')}"
    if os.environ.get("HF_ENDPOINT"):
        advice += f", and HF_ENDPOINT, which is {os.environ['HF_ENDPOINT']!r}"
    return f"{advice}; without a network give a local folder, or set HF_HUB_OFFLINE=1 for one in the Hub's cache."


def _check_certificates() -> None:
    for name, is_there in (("SSL_CERT_FILE", Path.is_file), ("SSL_CERT_DIR", Path.is_dir)):
        value = os.environ.get(name)
        if value and not is_there(Path(value)):
            raise _wrong(name, value, f"a {'file' if name.endswith('FILE') else 'folder'} of certificates")
    if file := os.environ.get("SSL_CERT_FILE"):
        try:
            ssl.create_default_context(cafile=file)
        except OSError as error:  # ssl.SSLError is one
            raise _wrong("SSL_CERT_FILE", file, f"a file of certificates in PEM form ({error})") from error


def _check_proxy(name: str, proxy: str) -> None:
    allowed = ("http", "https", *_SOCKS)
    with_scheme = proxy if "://" in proxy else f"http://{proxy}"  # as httpx takes it
    if not _is_address(with_scheme, allowed):
        raise _wrong(name, proxy, f"an address that begins with one of {', '.join(f'{each}://' for each in allowed)}")
    if urlsplit(with_scheme).scheme in _SOCKS and importlib.util.find_spec("socksio") is None:
        raise SourceError(
            f"{name} is {_without_password(proxy)!r}, and a SOCKS proxy needs the package socksio. "
            f"Install it (pip install socksio), set {name} to an http:// proxy, or unset it."
        )


def _is_address(text: str, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0 and text.isprintable()
    except ValueError:  # a port that is no number
        return False


def _variable(name: str) -> str:
    """The variable as it is set; of lower and upper case the lower one decides."""
    return next((each for each in (name, name.upper()) if each in os.environ), f"the system's {name}")


def _without_password(address: str) -> str:
    return re.sub(r"(//)?[^/@]*@", r"\1...@", address)


def _wrong(name: str, value: str, expected: str) -> SourceError:
    return SourceError(
        f"{name} is {_without_password(value)[:200]!r}, expected {expected}. Correct it, or unset {name}."
    )
