"""Who may use the API."""

import pytest

from ppcl.errors import UserError
from serve.api.auth import ApiKeys, check_exposure, check_host
from serve.config import Http
from serve.protocol import Refused


@pytest.fixture(autouse=True)
def no_keys_in_the_environment(monkeypatch):
    monkeypatch.delenv("PPCL_API_KEYS", raising=False)


def refusal(keys: ApiKeys, header: str | None) -> Refused:
    with pytest.raises(Refused) as caught:
        keys.check(header)
    assert caught.value.status == 401
    return caught.value


def test_keys_come_from_the_environment_and_from_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEYS", "one, two,")
    (tmp_path / "keys").write_text("three\n\nfour\n")
    keys = ApiKeys(Http(api_keys_env="MY_KEYS", api_keys_file=tmp_path / "keys"))
    for key in ("one", "two", "three", "four"):
        keys.check(f"Bearer {key}")
        keys.check(f"bearer  {key} ")


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic c2VzYW1l",
        "sesame",
        "Bearer sesam",
        "Bearer sesame two",
        "Bearer SESAME",
        "Bearer \xff",
    ],
)
def test_anything_but_a_known_key_is_refused(monkeypatch, header):
    monkeypatch.setenv("PPCL_API_KEYS", "sesame")
    refused = refusal(ApiKeys(Http()), header)
    assert "sesam" not in refused.message.lower()


def test_a_file_without_keys_is_an_error_rather_than_an_open_server(tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(UserError, match="holds no key"):
        ApiKeys(Http(api_keys_file=tmp_path / "empty"))
    with pytest.raises(UserError, match="No such file"):
        ApiKeys(Http(api_keys_file=tmp_path / "gone"))
    (tmp_path / "odd").write_text("good\nkey with blanks\n")
    with pytest.raises(UserError, match="API key 2 of 2") as caught:
        ApiKeys(Http(api_keys_file=tmp_path / "odd"))
    assert "with blanks" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "open_to_others"),
    [
        ("127.0.0.1", False),
        ("localhost", False),
        ("::1", False),
        ("127.8.8.8", False),
        ("0.0.0.0", True),
        ("::", True),
        ("10.0.0.7", True),
        ("example", True),
    ],
)
def test_without_keys_only_this_machine_is_listened_to(monkeypatch, host, open_to_others):
    if open_to_others:
        with pytest.raises(UserError, match="there is no API key"):
            check_exposure(Http(host=host), ApiKeys(Http()))
    else:
        check_exposure(Http(host=host), ApiKeys(Http()))
    monkeypatch.setenv("PPCL_API_KEYS", "one")
    check_exposure(Http(host=host), ApiKeys(Http()))


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]", "LOCALHOST:1"]
)
def test_this_machines_own_names_are_served_without_keys(host):
    check_host(host)


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "10.0.0.7:8000",
        "[fe80::1]:8000",
        "]",
    ],
)
def test_other_names_of_this_machine_are_not(host):
    with pytest.raises(Refused) as caught:
        check_host(host)
    assert caught.value.status == 403
