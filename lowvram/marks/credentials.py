"""C2PA content credentials, by c2pa-python (the extra `c2pa`): signed with a certificate of the user's own, offline."""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lowvram.errors import LowVRAMError
from lowvram.libraries import load
from lowvram.marks.origin import Origin

_FORMATS = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp", "mp4": "video/mp4"}
_EC = {256: "es256", 384: "es384", 521: "es512"}  # by the bits of the curve
_PARENT = {"label": "parent", "relationship": "parentOf"}  # no title: what a user's file is called is their own affair
_REMEDY = 'Install it with pip install "lowvram[c2pa]".'
# Whatever else a validator may find, these tell of the bytes and of who signed them.
_UNTRUSTED = "signingCredential.untrusted"


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What a file's manifest says, and whether it holds.

    issuer: of the certificate, as it calls itself. faults: what does not hold, by C2PA's codes; empty: the signature is
    of that certificate, and the file has not changed since. trusted: the certificate is on a trust list that the
    library was given; without one it never is. source: the IPTC digital source type of the first action that has one.
    actions: what was done, in order, by C2PA's names ("c2pa.opened").
    """

    issuer: str
    tool: str
    source: str | None
    faults: tuple[str, ...]
    trusted: bool
    actions: tuple[str, ...] = ()


def check(certificate: Path, key: Path, parent: Path | None = None) -> None:
    """Raise LowVRAMError unless images can be signed with the certificate and key: a small one is, for a trial.

    parent: the picture that they are made of, as of `sign`.
    """
    from PIL import Image

    with TemporaryDirectory() as folder:
        plain, signed = Path(folder, "plain.png"), Path(folder, "signed.png")
        Image.new("RGB", (8, 8)).save(plain)
        sign(plain, signed, format="png", origin=Origin(), certificate=certificate, key=key, parent=parent)
        found = read(signed)
    if found is None or found.faults:
        faults = "nothing is found" if found is None else ", ".join(found.faults)
        raise _refused(certificate, ValueError(f"what it signs does not hold ({faults})"))


def sign(
    source: Path, to: Path, *, format: str, origin: Origin, certificate: Path, key: Path, parent: Path | None = None
) -> None:
    """Write a signed copy of a file. format: png, jpg, webp or mp4. No server is asked for the time.

    parent: the picture that the image was made of, which was then opened and edited where others are created: C2PA
    wants one of created and opened to come first, and what was opened as an ingredient. The picture's own manifest,
    where it has one, goes along with the image; its pixels and its name don't.

    Raises:
        LowVRAMError: the library is missing, the certificate and key are none that it signs with, or the parent can't
            be read.
    """
    c2pa = _library()
    made: dict[str, Any] = {
        "action": "c2pa.created" if parent is None else "c2pa.edited",
        "digitalSourceType": origin.source,
        "softwareAgent": {"name": "lowvram", "version": origin.version},
    }
    opened = {"action": "c2pa.opened", "parameters": {"ingredientIds": [_PARENT["label"]]}}
    manifest: dict[str, Any] = {
        "claim_generator_info": [{"name": "lowvram", "version": origin.version}],
        "assertions": [
            {"label": "c2pa.actions", "data": {"actions": [made] if parent is None else [opened, made]}},
            {"label": "lowvram.origin", "data": origin.values()},
        ],
    }
    bare = {"builder": {"thumbnail": {"enabled": False}}}  # which may be larger than the image
    with _signer(certificate, key) as signer, c2pa.Context.from_dict(bare) as context:
        try:
            with (
                c2pa.Builder(manifest, context) as builder,
                source.open("rb") as plain,
                to.open("w+b") as signed,
            ):
                if parent is not None:
                    _add_parent(builder, parent)
                builder.sign(signer, _FORMATS[format], plain, signed)
        except c2pa.C2paError as error:
            raise _refused(certificate, error) from error


def _add_parent(builder: Any, parent: Path) -> None:
    from PIL import Image

    try:
        with Image.open(parent) as image:
            kind = "image/jpeg" if image.format == "MPO" else image.get_format_mimetype()  # a JPEG with more behind it
        with parent.open("rb") as file:
            builder.add_ingredient(_PARENT, kind, file)
    except (OSError, _library().C2paError) as error:
        raise LowVRAMError(
            f"{parent} can't be named in a signature as what the image is made of: {str(error)[:300]}.",
            "Save it anew as PNG, or leave certificate and key out.",
        ) from error


def read(path: Path) -> Credentials | None:
    """The manifest of a file and whether it holds; None where there is none. Nothing is fetched from the network.

    Raises:
        LowVRAMError: the library is missing.
        ValueError: there is a manifest that can't be read.
    """
    c2pa = _library()
    offline = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
    try:
        with c2pa.Context.from_dict(offline) as context, path.open("rb") as file:
            reader = c2pa.Reader.try_create(None, file, context=context)
            if reader is None:
                return None
            with reader:
                return _told(json.loads(reader.json()))
    except c2pa.C2paError as error:
        if type(error).__name__.endswith("NotSupported"):
            return None
        raise ValueError(f"its C2PA manifest can't be read: {str(error)[:200]}") from error


def _told(store: dict[str, Any]) -> Credentials:
    manifest = store.get("manifests", {}).get(store.get("active_manifest", ""), {})
    status = store.get("validation_status") or []
    codes = [str(entry.get("code")) for entry in status]
    actions = [
        action
        for assertion in manifest.get("assertions", [])
        if str(assertion.get("label", "")).startswith("c2pa.actions")
        for action in assertion.get("data", {}).get("actions", [])
    ]
    signature = manifest.get("signature_info", {})
    generator = (manifest.get("claim_generator_info") or [{}])[0]
    tool = f"{generator.get('name', manifest.get('claim_generator', ''))} {generator.get('version', '')}".strip()
    return Credentials(
        issuer=str(signature.get("issuer") or signature.get("common_name") or "no name"),
        tool=tool,
        source=next((str(a["digitalSourceType"]) for a in actions if a.get("digitalSourceType")), None),
        faults=tuple(dict.fromkeys(code for code in codes if code != _UNTRUSTED)),
        trusted=store.get("validation_state") == "Trusted",
        actions=tuple(str(action["action"]) for action in actions if action.get("action")),
    )


def _signer(certificate: Path, key: Path) -> Any:
    c2pa = _library()
    try:
        chain, secret = certificate.read_bytes(), key.read_bytes()
    except OSError as error:
        raise LowVRAMError(
            f"the certificate or its key can't be read: {error}.",
            "Give certificate=chain.pem key=key.pem (in training mark.certificate and mark.key).",
        ) from error
    try:
        return c2pa.Signer.from_info(c2pa.C2paSignerInfo(_algorithm(secret), chain, secret, None))
    except (c2pa.C2paError, ValueError, TypeError) as error:
        raise _refused(certificate, error) from error


def _algorithm(secret: bytes) -> str:
    """The C2PA name of what a key signs with (specification 13.2). Raises ValueError, TypeError for others."""
    load("cryptography", "signing", _REMEDY)
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(secret, password=None)
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.key_size in _EC:
        return _EC[key.curve.key_size]
    if isinstance(key, rsa.RSAPrivateKey):
        return "ps256"
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    raise ValueError(f"a key of type {type(key).__name__} is none that C2PA knows")


def _refused(certificate: Path, error: Exception) -> LowVRAMError:
    return LowVRAMError(
        f"images can't be signed with {certificate}: {str(error)[:300]}.",
        "Give a PEM chain, your own certificate first, for digital signatures, and its key as PEM with no password.",
    )


def _library() -> Any:
    return load("c2pa", "a C2PA signature", _REMEDY)
