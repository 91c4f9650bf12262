"""Connection settings reach both clients, aiokafka's and Faust's, and wrong ones are refused by name."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from faust import SASLCredentials, SSLCredentials

from stream.app import faust_credentials
from stream.kafka import KafkaConfig


def test_a_plain_connection_has_no_secrets_and_no_tls() -> None:
    options = KafkaConfig(bootstrap_servers="kafka:9092", request_timeout_ms=1_234).client_options()
    assert options == {
        "bootstrap_servers": "kafka:9092",
        "security_protocol": "PLAINTEXT",
        "request_timeout_ms": 1_234,
    }
    assert faust_credentials(KafkaConfig()) is None


def test_sasl_over_tls_is_passed_through() -> None:
    config = KafkaConfig(
        security_protocol="SASL_SSL", sasl_mechanism="SCRAM-SHA-512", sasl_username="trainer", sasl_password="s3cret"
    )
    options = config.client_options()
    assert options["security_protocol"] == "SASL_SSL"
    assert options["sasl_mechanism"] == "SCRAM-SHA-512"
    assert (options["sasl_plain_username"], options["sasl_plain_password"]) == ("trainer", "s3cret")
    assert options["ssl_context"].verify_mode == ssl.CERT_REQUIRED
    credentials = faust_credentials(config)
    assert isinstance(credentials, SASLCredentials)
    assert (credentials.username, credentials.password) == ("trainer", "s3cret")
    assert credentials.mechanism is not None
    assert credentials.mechanism.value == "SCRAM-SHA-512"
    assert credentials.protocol.value == "SASL_SSL"


def test_sasl_without_tls_and_tls_without_sasl() -> None:
    plain = KafkaConfig(security_protocol="SASL_PLAINTEXT", sasl_username="u", sasl_password="p")
    assert "ssl_context" not in plain.client_options()
    credentials = faust_credentials(plain)
    assert isinstance(credentials, SASLCredentials)
    assert credentials.protocol.value == "SASL_PLAINTEXT"
    tls = KafkaConfig(security_protocol="SSL")
    assert "sasl_mechanism" not in tls.client_options()
    assert isinstance(faust_credentials(tls), SSLCredentials)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"security_protocol": "TLS"}, "log.security_protocol = 'TLS'"),
        ({"security_protocol": "SASL_SSL"}, "needs log.sasl_username"),
        ({"sasl_mechanism": "GSSAPI"}, "log.sasl_mechanism = 'GSSAPI'"),
        ({"ssl_cafile": "/no/such/ca.pem"}, "log.ssl_cafile = '/no/such/ca.pem': there is no such file"),
        ({"num_partitions": 0}, "log.num_partitions = 0"),
        ({"log_id": ""}, "log.log_id is empty"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        KafkaConfig(**settings)  # type: ignore[arg-type]


def test_an_existing_certificate_file_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_text("")
    assert KafkaConfig(ssl_cafile=str(path)).ssl_cafile == str(path)
