"""The secrets of one run: a self-signed certificate, its key and a bearer token.

Who can read `auth/` can speak to the buffer, nobody else: the run's certificate is the only trust
anchor of its clients, and the token is compared in constant time. So the modes of the run's files
are part of the lock, and are looked at before they are relied on.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
import shutil
import socket
import ssl
from pathlib import Path

from dapo_hpc.network import local_addresses
from dapo_hpc.run_dir import RunDir, fsync_directory

CERTIFICATE, KEY, TOKEN = "certificate.pem", "key.pem", "token"
SERVER_NAME = "dapo-buffer"
"""The name that clients expect in the certificate, whatever address they reach the buffer at."""
VALID_DAYS = 3650


def create_auth(run: RunDir) -> None:
    """Create the run's secrets, once; a second call, or a race, leaves the first ones.

    Raises ValueError when others could change the run's files, or read its secrets.
    """
    check_modes(run)
    if run.auth.exists():
        check_auth(run)
        return
    temporary = run.auth.with_name(f".auth.{os.getpid()}.{secrets.token_hex(4)}")
    temporary.mkdir(mode=0o700, parents=True)
    certificate, key = _self_signed()
    for name, content in ((CERTIFICATE, certificate), (KEY, key), (TOKEN, _token())):
        _write_private(temporary / name, content)
    fsync_directory(temporary)
    try:
        os.rename(temporary, run.auth)
    except OSError:
        shutil.rmtree(temporary)
        check_auth(run)
    fsync_directory(run.root)


def check_auth(run: RunDir) -> None:
    """Raises ValueError when the secrets are incomplete, or others could read them."""
    for path in _secrets(run):
        if not path.exists():
            raise ValueError(f"{path} is missing; delete {run.auth} and start the run again.")
        _require_private(run, path)


def _secrets(run: RunDir) -> list[Path]:
    return [run.auth, *(run.auth / name for name in (CERTIFICATE, KEY, TOKEN))]


def _require_private(run: RunDir, path: Path) -> None:
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ValueError(
            f"{path} has mode {mode:o}: other users could speak to this run's buffer. Expected "
            f"no access for group and others; run chmod -R go-rwx {run.auth}."
        )


def check_modes(run: RunDir) -> None:
    """Raises ValueError when others could change what lies in the run directory, or read `jobs/`.

    Looks at the directory and at what lies directly in it. Others may read it.
    """
    mode = run.jobs.stat().st_mode & 0o777 if run.jobs.exists() else 0
    if mode & 0o077:
        raise ValueError(
            f"{run.jobs} has mode {mode:o}: what lies there is executed when a job starts. "
            "Expected no access for group and others; run chmod -R go-rwx "
            f"{run.jobs}."
        )
    children = sorted(run.root.iterdir()) if run.root.exists() else []
    for path in (run.root, *children):
        mode = path.lstat().st_mode & 0o777 if path.exists() and not path.is_symlink() else 0
        if mode & 0o022:
            raise ValueError(
                f"{path} has mode {mode:o}: other users could change this run's data. Expected no "
                f"write access for group and others; run chmod -R go-w {run.root}."
            )


def token(run: RunDir) -> str:
    return (run.auth / TOKEN).read_text()


def client_context(run: RunDir) -> ssl.SSLContext:
    """Trusts the run's certificate and nothing else.

    Raises ValueError when others could read the secrets, FileNotFoundError before there are any.
    """
    for path in _secrets(run):
        _require_private(run, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=str(run.auth / CERTIFICATE))
    return context


def _token() -> bytes:
    return secrets.token_hex(32).encode()


def _write_private(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _self_signed() -> tuple[bytes, bytes]:
    """(certificate, key) as PEM; valid from yesterday, because clocks of nodes differ."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, SERVER_NAME)])
    names: list[x509.GeneralName] = [
        x509.DNSName(n) for n in (SERVER_NAME, "localhost", socket.gethostname())
    ]
    names += [x509.IPAddress(ipaddress.ip_address(a)) for a in ("127.0.0.1", *local_addresses())]
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return certificate.public_bytes(serialization.Encoding.PEM), private
