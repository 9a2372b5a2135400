"""What a run was made with besides its spec: text, command, machine, source."""

import hashlib
import pathlib
import subprocess

from scripts.local_server import ROOT, Failure


def conditions(text_path, text_sha256, tokenization, command):
    """What every record of this start says of the circumstances. Nothing in it is a path or a host's name."""
    text = {"name": text_path.name, "sha256": text_sha256, "train_tokens": tokenization["train_tokens"],
            "valid_tokens": tokenization["valid_tokens"]}
    return {"text": text, "command": command, "machine": machine(), "commit": commit()}


def command_line(arguments):
    """The command as anybody could give it, without the folders of this machine."""
    return (f"experiments/run --text {arguments.text.name} --config {arguments.config.name} "
            f"--parallel {arguments.parallel} --threads {arguments.threads}")


def sha256_of(path):
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Failure(f"the text cannot be read: {error}") from error


def machine():
    """The processor's model and how many there are."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": models[0] if models else "unknown", "num_cpus": len(models)}


def commit():
    """The commit of the source, with a mark if files were changed since; None without a repository."""
    described = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return described.stdout.strip() or None
