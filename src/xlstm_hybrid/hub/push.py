"""Sharing a checkpoint: only files on a list, nothing that tells of the machine or opens one, every byte as the
manifest says.
"""

import getpass
import json
import platform
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

from xlstm_hybrid.checkpoint.files import INDEX, MANIFEST, PROVENANCE, SECRETS, SINGLE, read_json, verify_files
from xlstm_hybrid.checkpoint.weights import SETTINGS_FILES, TEMPLATES, weight_faults
from xlstm_hybrid.errors import CheckpointError, ShareError

CARD, CONFIG = "README.md", "config.json"
NEEDED = (CONFIG, CARD, MANIFEST, PROVENANCE)
ALLOWED = {*NEEDED, SINGLE, INDEX, "training_log.json", "LICENSE", "NOTICE"}
PATTERNS = (re.compile(r"model-\d{5}-of-\d{5}\.safetensors"), re.compile(r"[A-Za-z0-9][\w.-]{0,90}\.png"))
PATTERNS += tuple(re.compile(re.escape(name).replace(r"\*", r"[\w.-]{0,90}")) for name in SETTINGS_FILES)
CODE = re.compile(r"[a-z_][a-z0-9_]{0,90}\.py")  # only on demand: a checkpoint with remote code
REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# any text may be a token: searched for keys only
VOCABULARIES = re.compile(
    r"tokenizer\.([\w.-]+\.)?json|tekken\.json|vocab.*|merges.*|[\w.-]+\.(model|model\.v\d+|tiktoken)"
)
CAPS = {"tensors": 20_000, "header": 2**24, "config": 2**20, "depth": 20}
KEYS = re.compile(
    r"hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{18,}"
    r"|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
ROOTS = "home|Users|root|tmp|var|mnt|media|data|scratch|workspace|work|opt|srv|private|content|kaggle|gpfs|lustre|usr|etc|nfs|storage"
PATHS = re.compile(rf"(?<![\w.:/])(?:/(?:{ROOTS})/[\w.~-]+|~/[\w.-]+|[A-Za-z]:\\{{1,2}}[\w.~-]+|\\\\[\w.-]+\\[\w$.-]+)")
SHOWN = 4  # characters of a key that an error shows


@dataclass
class Parcel:
    """What would be uploaded: `files` {name: (bytes, SHA-256)}, and what its owner should know."""

    folder: str
    repo: str
    files: dict
    warnings: list = field(default_factory=list)
    commit: str | None = None

    @property
    def size(self):
        return sum(size for size, _ in self.files.values())


# --- what must not leave ---------------------------------------------------------------------------------------


def unlisted(folder, code):
    """Names that are not on the list of what a checkpoint holds, links and folders; in words."""
    programs = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            yield f"{name}: is a link, expected a file"
        elif path.is_dir():
            if name != TEMPLATES:
                yield f"{name}/: is a folder, expected files only"
        elif path.parent not in (folder, folder / TEMPLATES):
            continue  # of what lies in a folder, the folder is named
        elif name in ALLOWED or any(p.fullmatch(name) for p in PATTERNS):
            continue
        elif not CODE.fullmatch(name):
            yield f"{name}: is not a file that a checkpoint needs"
        elif not code:
            programs.append(name)
    if programs:
        shown = ", ".join(programs[:3]) + f" and {len(programs) - 3} more" * (len(programs) > 3)
        verb = "is" if len(programs) == 1 else "are"
        yield f"{shown}: {verb} code; allow it with --code if this checkpoint is meant to run with trust_remote_code"


def findings(text, names=()):
    """`(kind, what was found, shortened)` for every key, path of a machine, and name of this machine or user."""
    for match in KEYS.finditer(text):
        yield "a key", f"{match[0][:SHOWN]}..."
    for match in PATHS.finditer(text):
        yield "a path of a machine", re.match(r"/?[^/\\]*[/\\]+", match[0])[0] + "..."
    for name in names:
        if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text):
            yield "the name of this machine or its user", f"{name[:SHOWN]}..."


def own_names():
    """Host and user name, where they are not names that any machine may have."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        user = ""
    common = {"root", "user", "localhost", "runner", "ubuntu", "admin", "jovyan", "docker", "main", "test"}
    return [name for name in (platform.node(), user) if len(name) > 3 and name.lower() not in common]


def unique_object(pairs):
    """A JSON object, unless a key stands in it twice: two readers could then see two different files."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return dict(pairs)


def entries(value):
    """`(key or index, value)` of what a JSON value holds."""
    return value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()


def depth(value):
    return 1 + max((depth(inner) for _, inner in entries(value)), default=0)


def secret_entries(value, name=""):
    """Names of JSON entries that are called like a secret and hold text."""
    for key, inner in entries(value):
        if isinstance(inner, str) and inner and SECRETS.search(str(key)):
            yield f"{name}.{key}".strip(".")
        yield from secret_entries(inner, f"{name}.{key}")


def inspect_json(path):
    """What is wrong with a JSON file, in words."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_object)
        if not VOCABULARIES.fullmatch(path.name) and depth(content) > CAPS["depth"]:
            yield f"{path.name}: nested {depth(content)} deep, expected at most {CAPS['depth']}"
    except (ValueError, RecursionError) as error:
        yield f"{path.name}: is no JSON that every reader understands in one way ({error})"
        return
    if path.name == CONFIG and path.stat().st_size > CAPS["config"]:
        yield f"{path.name}: {path.stat().st_size} bytes, expected at most {CAPS['config']}"
    if not VOCABULARIES.fullmatch(path.name):
        yield from (f"{path.name}: {entry} holds a secret by its name" for entry in secret_entries(content))


def inspect_weights(path):
    """`(texts of what is wrong, text of the header that may hold anything)` of a safetensors file, read without its
    tensors.
    """
    with open(path, "rb") as file:
        length, cap = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0], CAPS["header"]
        if not 0 < length <= min(cap, path.stat().st_size):
            return [
                f"{path.name}: a header of {length} bytes, expected at most {cap} and no more than the file has"
            ], ""
        try:
            header = json.loads(file.read(length), object_pairs_hook=unique_object)
        except ValueError as error:
            return [f"{path.name}: its header is damaged ({error})"], ""
    notes, cap = header.pop("__metadata__", {}), CAPS["tensors"]
    wrong = [f"{path.name}: {len(header)} tensors, expected at most {cap}"] if len(header) > cap else []
    return wrong, json.dumps([notes, list(header)], ensure_ascii=False)


def png_text(path):
    """The text chunks of a PNG, where programs write names and paths; `[compressed]` stands for what would have to be
    unpacked first.
    """
    data, place, texts = path.read_bytes(), 8, []
    while place + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        if kind in (b"tEXt", b"iTXt", b"zTXt", b"eXIf"):
            text = data[place + 8 : place + 8 + length].decode("latin-1")
            # keyword of at most 79 characters, end, flag
            packed = kind == b"zTXt" or (kind == b"iTXt" and "\0\1" in text[:82])
            texts.append("[compressed]" if packed else text)
        place += 12 + length
    return "\n".join(texts)


def inspect(path, names):
    """Everything about one file that must not leave the machine, in words."""
    wrong = list(inspect_json(path)) if path.suffix == ".json" else []
    if path.suffix == ".safetensors":
        wrong, text = inspect_weights(path)
    elif path.suffix == ".png":
        text = png_text(path)
        wrong += [f"{path.name}: holds compressed text, expected none"] if "[compressed]" in text else []
    else:
        text = path.read_bytes().decode("utf-8", "replace")
    keys_only = VOCABULARIES.fullmatch(path.name)
    found = dict.fromkeys((kind, shown) for kind, shown in findings(text, names) if kind == "a key" or not keys_only)
    return wrong + [f"{path.name}: holds {kind} ({shown})" for kind, shown in found]


# --- sharing ---------------------------------------------------------------------------------------------------


def inspect_folder(folder, repo, *, code=False):
    """Check a checkpoint that is to be shared; needs no network.

    Args:
        code: allow Python files and the `auto_map` that names them.
    Returns:
        Parcel
    Raises:
        ShareError: everything that must not leave, listed at once.
        CheckpointError: the files are not those of the manifest, or of another format.
    """
    folder, wrong = Path(folder), []
    if not REPO.fullmatch(repo):
        wrong.append(f"repo {repo!r}: expected NAME/NAME of letters, digits, dots, dashes and underscores")
    if not folder.is_dir():
        raise ShareError(f"{folder.name}: no such folder; name the directory of a checkpoint")
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    wrong += [f"{name}: is missing" + " (xlstm-hybrid card writes it)" * (name == CARD) for name in missing]
    wrong += unlisted(folder, code)
    if not wrong:
        verify_files(folder)
        listed, paths = read_json(folder / MANIFEST, folder.name)["files"], sorted(folder.rglob("*"))
        paths = {p.relative_to(folder).as_posix(): p for p in paths if p.is_file()}
        wrong += [f"{name}: is not listed in {MANIFEST}" for name in paths if name not in {*listed, MANIFEST}]
        if not code and "auto_map" in read_json(folder / CONFIG, folder.name):
            wrong.append(f"{CONFIG}: auto_map names code; remove it, or allow code with --code")
        names = own_names()
        wrong += [text for path in paths.values() for text in inspect(path, names)]
        wrong += weight_faults(folder)
    if wrong:
        steps = []
        if missing:
            steps.append(
                "Stages of this package write what is missing; for another trainer's student see docs/finetune.md, Card and upload"
            )
        if len(wrong) > len(missing):
            steps.append(f"Remove {'the other findings' if missing else 'these'}, then write manifest and card again")
        raise ShareError(
            f"{folder.name} must not be shared as it is, {len(wrong)} findings: {'; '.join(wrong)}. {'. '.join(steps)}"
        )
    files = {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()}
    files[MANIFEST] = ((folder / MANIFEST).stat().st_size, None)
    card = (folder / CARD).read_text(encoding="utf-8")
    block = card.split("---\n")[1] if card.startswith("---\n") else ""
    lacks = [key for key in ("license", "base_model") if not re.search(rf"^{key}:", block, re.MULTILINE)]
    warnings = [f"the card names no {key}: its stages recorded none" for key in lacks]  # no reason to refuse
    return Parcel(folder.name, repo, files, warnings)


def push(folder, repo, *, dry_run=False, private=False, code=False, message=None, token=None, api=None):
    """Check a checkpoint and upload it to the Hub in one commit; `dry_run` checks only and opens no connection.

    Args:
        folder: the checkpoint.  repo: NAME/NAME on the Hub, made if it is not there.
        code: see `inspect_folder`.
        token: of the Hub; the one that is logged in by default. It is never written anywhere.
        api: a `huggingface_hub.HfApi`, for other endpoints.
    Returns:
        Parcel, with the hash of its commit.
    Raises:
        ShareError, CheckpointError: see `inspect_folder`; a file that changed while it was read; an upload that arrived
            damaged.
    """
    parcel = inspect_folder(folder, repo, code=code)
    if dry_run:
        return parcel
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api, operations = api or HfApi(token=token), []
    for name, (_, sha256) in parcel.files.items():
        operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(Path(folder) / name))
        if sha256 is not None and operation.upload_info.sha256.hex() != sha256:
            raise CheckpointError(
                f"{parcel.folder}: {name} changed after it was checked; leave the folder alone, then push again"
            )
        operations.append(operation)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(
            repo, operations, commit_message=message or f"Upload {parcel.folder} with xlstm-hybrid"
        )
        arrived = {entry.path: entry for entry in api.get_paths_info(repo, list(parcel.files), revision=commit.oid)}
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ShareError(
            f"{repo}: the Hub refused or could not be reached ({type(error).__name__}); log in with `hf auth login`, check the name, "
            "then push again; what was there is untouched"
        ) from error
    parcel.commit, wrong = commit.oid, []
    for name, (size, sha256) in parcel.files.items():  # by size, and by SHA-256 what the Hub keeps as a large file
        entry = arrived.get(name)
        remote = getattr(getattr(entry, "lfs", None), "sha256", None)
        if entry is None or entry.size != size or (remote and sha256 and remote != sha256):
            wrong.append(f"{name} ({'missing' if entry is None else f'{entry.size} bytes'}, expected {size})")
    if wrong:
        raise ShareError(f"{parcel.repo} at {parcel.commit}: {', '.join(wrong)} arrived damaged; push again")
    return parcel
