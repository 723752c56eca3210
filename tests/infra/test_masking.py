"""Secrets and response bodies are removed from printed messages."""

import pytest

from sidestack.infra.masking import has_secret, masked, one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:planted@host:5000/path", "http://***@host:5000/path"),
        ("http://planted@host", "http://***@host"),
        ("postgresql+psycopg2://mlflow:pl@nted/and:more@host/db", "postgresql+psycopg2://***@host/db"),
        ("see (http://a:planted@b) and http://c:planted@d", "see (http://***@b) and http://***@d"),
        ("postgresql://host/db?user=u&password=planted&sslmode=require",
         "postgresql://host/db?user=u&password=***&sslmode=require"),
        ("https://host/get?X-Amz-Security-Token=planted", "https://host/get?X-Amz-Security-Token=***"),
        ("http://host:5000/a?step=1", "http://host:5000/a?step=1"),
        ("sqlite:////runs/a@b/mlflow.db", "sqlite:////runs/a@b/mlflow.db"),
        ("somebody@example.com", "somebody@example.com"),
    ],
)  # fmt: skip
def test_uris_are_shown_without_secrets(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert has_secret(text) == (text != shown)


def test_one_line_shortens_an_error_and_drops_the_response_body() -> None:
    page = "<html>" + "x" * 20_000_000
    error = ValueError(f"API request to http://a:planted@b/api\nfailed with 502. Response body: '{page}'")
    assert one_line(error) == "ValueError: API request to http://***@b/api failed with 502"
    assert len(one_line(ValueError("word " * 1000))) < 250
    assert one_line(ValueError("bell\a\x1b[31m")) == "ValueError: bell[31m"
    assert one_line(ValueError()) == "ValueError: "
