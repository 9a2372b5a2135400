"""docker-compose.yml and the Dockerfiles name only what there is, checked without an engine."""

import pathlib
import re
import shutil
import subprocess

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]


def documented_settings():
    """Variable names of .env.example, where every setting is on a line of its own."""
    return set(re.findall(r"^#?([A-Z][A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))


def dockerfile(name):
    return (ROOT / SERVICES[name]["build"]["dockerfile"]).read_text()


def has_compose_plugin():
    docker = shutil.which("docker")
    return docker and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0


def test_the_file_is_what_compose_accepts():
    if has_compose_plugin():
        checked = subprocess.run(["docker", "compose", "config", "--quiet"], cwd=ROOT, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
    known = {"image", "build", "command", "environment", "ports", "volumes", "depends_on", "healthcheck", "restart",
             "stop_grace_period", "gpus"}
    assert set(COMPOSE) <= {"services", "volumes", "x-own-servers"}
    for name, service in SERVICES.items():
        assert set(service) <= known, f"{name}: {set(service) - known}"
        assert ("image" in service) != ("build" in service), name


def test_all_parts_of_the_service_are_there():
    assert set(OURS) == {"api", "worker"}
    assert {"postgres", "garage"} <= set(SERVICES)


def test_every_setting_of_our_images_is_documented():
    documented = documented_settings()
    assert len(documented) > 10
    for name in OURS:
        in_image = set(re.findall(r"\b((?:RELORA|S3|AWS|DATABASE)_[A-Z_]+)=", dockerfile(name))) - {"RELORA_CACHE_DIR"}
        unknown = (set(SERVICES[name]["environment"]) | in_image) - documented
        assert not unknown, f"{name} sets {sorted(unknown)}, which .env.example does not document"


def test_api_and_worker_use_the_same_database_and_store():
    shared = COMPOSE["x-own-servers"]
    for name in OURS:
        assert shared.items() <= SERVICES[name]["environment"].items()
    assert "@postgres:5432/" in shared["DATABASE_URL"]
    assert shared["S3_ENDPOINT"] == "http://garage:3900"


def test_the_store_makes_the_key_and_the_bucket_that_are_used():
    shared, garage = COMPOSE["x-own-servers"], SERVICES["garage"]["environment"]
    assert garage["GARAGE_DEFAULT_ACCESS_KEY"] == shared["AWS_ACCESS_KEY_ID"]
    assert garage["GARAGE_DEFAULT_SECRET_KEY"] == shared["AWS_SECRET_ACCESS_KEY"]
    assert garage["GARAGE_DEFAULT_BUCKET"] == shared["S3_BUCKET"]
    assert f's3_region = "{shared["AWS_REGION"]}"' in (ROOT / "docker/garage.toml").read_text()


def test_every_file_and_volume_that_is_named_exists():
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), f"{name}: {source}"
    for name in OURS:
        context = ROOT / SERVICES[name]["build"]["context"]
        for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile(name), re.MULTILINE):
            for source in line.split()[:-1]:
                assert (context / source).exists(), f"{name} copies {source}, which is not there"


def test_who_depends_on_another_waits_until_it_is_healthy():
    for name, service in SERVICES.items():
        for other, wait in service.get("depends_on", {}).items():
            assert wait == {"condition": "service_healthy"}, f"{name} on {other}"
            assert "healthcheck" in SERVICES[other], f"{other} cannot become healthy"


def test_a_stopped_worker_has_the_time_that_it_is_promised():
    worker = SERVICES["worker"]
    longest_stop_s = 2 * int(worker["environment"]["RELORA_STOP_GRACE_S"]) + 30
    assert int(worker["stop_grace_period"].removesuffix("s")) > longest_stop_s


def test_the_api_image_is_built_without_libtorch():
    assert "--no-default-features" in dockerfile("api")
    assert "libtorch" not in dockerfile("api").split("FROM", 1)[1]
