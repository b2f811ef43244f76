from __future__ import annotations

import pytest

from serving.errors import ConfigError
from serving.listening import base_url, open_listener

pytestmark = pytest.mark.unit


def test_a_port_in_use_is_refused_with_a_cure() -> None:
    with open_listener("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use on 127.0.0.1; .*--port {port + 1}"):
            open_listener("127.0.0.1", port)


def test_a_host_without_an_address_is_refused_with_a_cure() -> None:
    with pytest.raises(ConfigError, match=r"use --host 127\.0\.0\.1"):
        open_listener("192.0.2.1", 0)


def test_connections_are_taken_before_anybody_serves_them() -> None:
    import socket

    with open_listener("localhost", 0) as listener:
        socket.create_connection(listener.getsockname()[:2]).close()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("[::1]", "http://[::1]:80"),
        ("chat.example.org", "http://chat.example.org:80"),
    ],
)
def test_the_page_reaches_the_server_by_a_name_this_machine_knows(host: str, url: str) -> None:
    assert base_url(host, 80) == url
