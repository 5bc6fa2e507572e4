"""Certificates, keys and kubeconfigs of a lab's control plane. Everything it writes is 0600."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshwire.lab.files import write_private
from meshwire.lab.model import Address

LIFETIME: Final = datetime.timedelta(days=365)
CLOCK_SKEW: Final = datetime.timedelta(hours=1)
"""Certificates are valid from this long ago: a VM's clock may be behind."""


@dataclass(frozen=True, slots=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_authority(directory: Path) -> Authority:
    """A new certificate authority, kept in ca.crt and ca.key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("meshwire-lab", ())
    certificate = (
        _builder(name, name, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(directory / "ca", certificate, key)
    return Authority(certificate, key)


def read_authority(directory: Path) -> Authority:
    key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return Authority(x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes()), key)


def make_server_certificate(
    authority: Authority, path: Path, *, names: Sequence[str], addresses: Iterable[Address]
) -> None:
    """PATH.crt and PATH.key, for a server reached by these names and addresses."""
    alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
    alternatives += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
    _issue(authority, path, _name(names[0], ()), ExtendedKeyUsageOID.SERVER_AUTH, alternatives)


def make_client_certificate(
    authority: Authority, path: Path, *, user: str, groups: Iterable[str] = ()
) -> None:
    """PATH.crt and PATH.key, that the API server takes for `user` in `groups`."""
    _issue(authority, path, _name(user, groups), ExtendedKeyUsageOID.CLIENT_AUTH, [])


def make_signing_key(path: Path) -> None:
    """The key service account tokens are signed with."""
    write_private(path, _key_pem(ec.generate_private_key(ec.SECP256R1())))


def write_kubeconfig(path: Path, *, server: str, directory: Path, identity: str) -> None:
    """For the client certificate `identity` in `directory`."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "lab",
                "cluster": {"server": server, "certificate-authority": str(directory / "ca.crt")},
            }
        ],
        "users": [
            {
                "name": identity,
                "user": {
                    "client-certificate": str(directory / f"{identity}.crt"),
                    "client-key": str(directory / f"{identity}.key"),
                },
            }
        ],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": identity}}],
        "current-context": "lab",
    }
    write_private(path, yaml.safe_dump(config, sort_keys=False).encode())


def _issue(
    authority: Authority,
    path: Path,
    subject: x509.Name,
    usage: x509.ObjectIdentifier,
    alternatives: Sequence[x509.GeneralName],
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(subject, authority.certificate.subject, key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    _write(path, builder.sign(authority.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + LIFETIME)
    )


def _name(user: str, groups: Iterable[str]) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    return x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, user)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(path: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    write_private(path.with_name(f"{path.name}.crt"), certificate.public_bytes(serialization.Encoding.PEM))
    write_private(path.with_name(f"{path.name}.key"), _key_pem(key))


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    # Not PKCS#8: the API server takes the public half of an EC key for tokens from this form only.
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
