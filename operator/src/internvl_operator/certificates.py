"""Make and check the certificates of the webhook, as PEM; the clock is passed in.

Each certificate has a CA of its own. The CA's key is discarded once it has signed, so that nobody can issue a second
certificate that API servers would trust.
"""

from datetime import datetime, timedelta
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFETIME = timedelta(days=90)
RENEW_AFTER = LIFETIME * 2 / 3
_CLOCK_SKEW = timedelta(minutes=5)  # an API server's clock may be behind ours
_CA_USAGE = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


class Served(NamedTuple):
    """What a replica serves: certificate and key; `authorities`: the CAs that clients must trust, newest first."""

    authorities: bytes
    certificate: bytes
    key: bytes


def issue(host: str, now: datetime) -> Served:
    """A new CA, and a certificate for this DNS name that it signed."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"internvl-operator webhook {now:%Y-%m-%d}")])
    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    authority = (
        _builder(ca_name, ca_name, ca_key, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_CA_USAGE, critical=True)
        .add_extension(ca_id, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id)
    certificate = (
        # An empty subject: a common name ends at 64 characters, and clients read only the DNS name.
        _builder(x509.Name([]), ca_name, key, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(issuer_id, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return Served(_pem(authority), _pem(certificate), _key_pem(key))


def unusable(served: Served, host: str, now: datetime) -> str | None:
    """Why clients would refuse this certificate now; None when they accept it."""
    if not (served.certificate and served.key):
        return "there is no certificate yet"
    try:
        certificate = x509.load_pem_x509_certificate(served.certificate)
        key = serialization.load_pem_private_key(served.key, password=None)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        authorities = x509.load_pem_x509_certificates(served.authorities)
    except (ValueError, TypeError, x509.ExtensionNotFound) as error:
        return f"the certificate or the key in the Secret cannot be read ({error})"
    if certificate.public_key() != key.public_key():
        return "the key belongs to another certificate"
    if host not in names.get_values_for_type(x509.DNSName):
        return f"the certificate is not for {host}"
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not start <= now < end:
        return f"the certificate is valid from {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC, not now"
    if not any(_issued_by(certificate, each) for each in authorities):
        return "the certificate's authority (CA) is not in ca.crt"
    return None


def renewal_due(served: Served, now: datetime) -> bool:
    """Whether two thirds of a certificate's lifetime have passed."""
    made = x509.load_pem_x509_certificate(served.certificate).not_valid_before_utc + _CLOCK_SKEW
    return now >= made + RENEW_AFTER


def expiry(certificate: bytes) -> datetime:
    """When a certificate expires. Raises ValueError."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def trusted(now: datetime, *bundles: bytes) -> bytes:
    """One bundle of the CAs in `bundles` that have not expired, in order, each once; skips unreadable bundles."""
    found = [certificate for bundle in bundles for certificate in _certificates(bundle)]
    return b"".join(dict.fromkeys(_pem(each) for each in found if now < each.not_valid_after_utc))


def _certificates(bundle: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(bundle)
    except ValueError:
        return []


def _issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + LIFETIME)
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
