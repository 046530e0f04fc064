"""A web service started from its image, an archive as `docker save` writes it, with no Docker.
The image is made here, out of the host's static busybox; yours would be a file that CI built."""

import hashlib
import io
import json
import tarfile
from http.client import HTTPConnection

import pytest


def add(tar, name, data, mode=0o644):
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """One layer with a shell, a web server and a page; the command and where it starts."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        with open("/bin/busybox", "rb") as busybox:
            add(tar, "bin/sh", busybox.read(), mode=0o755)
        add(tar, "www/index.html", b"hello from the image\n")
    digest = "sha256:" + hashlib.sha256(layer.getvalue()).hexdigest()
    config = {
        "config": {"Cmd": ["sh", "-c", "exec httpd -f -p 80"], "WorkingDir": "/www"},
        "rootfs": {"type": "layers", "diff_ids": [digest]},
    }
    manifest = [{"Config": "config.json", "RepoTags": ["web:1"], "Layers": ["layer.tar"]}]

    path = tmp_path_factory.mktemp("image") / "web.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "config.json", json.dumps(config).encode())
        add(tar, "layer.tar", layer.getvalue())
        add(tar, "manifest.json", json.dumps(manifest).encode())
    return path


def test_the_service_answers_on_a_port_of_the_host(nsbox_container_factory, image):
    web = nsbox_container_factory("web", rootfs=image, memory="32M", network="isolated")
    web.popen(web.rootfs.command)
    web.wait_for_port(80)

    client = HTTPConnection(*web.publish(80), timeout=10)
    client.request("GET", "/")
    assert client.getresponse().read() == b"hello from the image\n"
    client.close()
