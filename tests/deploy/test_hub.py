"""Models in folders and repositories of the Hub, without the Hub: a local folder, and a local server in its place."""

import hashlib
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from retina_fast import checkpoint as model_file
from retina_fast.checkpoint import Checkpoint
from retina_fast.data.errors import UserError
from retina_fast.deploy import hub

pytest.importorskip("safetensors")
huggingface_hub = pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def content():
    torch.manual_seed(0)
    kwargs = {"weights_backbone": None, "min_size": 128, "score_thresh": 0.2}
    made = Checkpoint("retinanet_resnet18_fpn_lite", kwargs, ["Tree", "Büsch"], [3, 7], {}, {"AP50": 0.52346})
    made.state_dict = made_model(made).state_dict()
    return made


def made_model(content):
    return model_file.build(content.builder, len(content.classes), **content.kwargs)


@pytest.fixture(scope="module")
def saved(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "street"
    hub.save_pretrained(content, folder, license="mit", data="Photographs of a street.")
    return folder


def same(found, content):
    assert {**vars(found), "state_dict": None} == {**vars(content), "state_dict": None}
    assert found.state_dict.keys() == content.state_dict.keys()
    assert all(torch.equal(value, content.state_dict[name]) for name, value in found.state_dict.items())


def test_a_folder_gives_back_what_was_saved(content, saved):
    found = hub.read_pretrained(saved)
    same(found, content)
    image = torch.rand(3, 64, 96)
    (ours,), (theirs,) = (model.build().eval()([image]) for model in (found, content))
    assert torch.equal(ours["boxes"], theirs["boxes"])


def test_a_model_file_is_taken(content, tmp_path):
    model_file.save(content, tmp_path / "model.pt")
    hub.save_pretrained(tmp_path / "model.pt", tmp_path / "out", license="mit")
    same(hub.read_pretrained(str(tmp_path / "out")), model_file.load(tmp_path / "model.pt"))


def test_the_card_says_what_is_known(saved):
    card = huggingface_hub.ModelCard.load(saved / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "retina_fast"
    assert card.data.pipeline_tag == "object-detection"
    for known in ("Tree, Büsch", "Photographs of a street.", "AP50: 0.5235", "`min_size=128`", 'load("street")'):
        assert known in card.text


def test_a_card_that_is_there_stays(content, saved, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    hub.save_pretrained(content, tmp_path, license="mit")
    hub.save_pretrained(content, tmp_path, license="mit")  # over an earlier model
    assert (tmp_path / "README.md").read_text() == "mine"


def test_refused(content, saved, tmp_path):
    with pytest.raises(TypeError, match="or a Checkpoint with the model's state_dict, got RetinaNet"):
        hub.save_pretrained(content.build(), tmp_path / "own", license="mit")
    with pytest.raises(UserError, match="license must name"):
        hub.save_pretrained(content, tmp_path / "new", license=" ")
    assert not (tmp_path / "new").exists()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="of another library"):
        hub.save_pretrained(content, tmp_path, license="mit")
    with pytest.raises(UserError, match=r"is a folder without model\.safetensors"):
        hub.read_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        hub.read_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="no model of this package"):
        hub.read_pretrained(tmp_path)
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"classes": "Tree"}))
    with pytest.raises(UserError, match="its classes is no list"):
        hub.read_pretrained(tmp_path)
    with pytest.raises(UserError, match="neither a folder nor a model of the Hub"):
        hub.read_pretrained("not a/name!", local_files_only=True)
    with (
        pytest.raises(UserError, match="need safetensors: pip install safetensors"),
        mock.patch.dict("sys.modules", {"safetensors.torch": None}),
    ):
        hub.save_pretrained(content, tmp_path / "new", license="mit")


def test_weights_of_another_library_stay(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"model\.safetensors: is there already, without config\.json"):
        hub.save_pretrained(content, tmp_path, license="mit")
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def test_what_no_file_can_hold_leaves_no_folder(content, tmp_path):
    with pytest.raises(UserError, match=r"its kwargs\['norm'\] is <class"):
        hub.save_pretrained(replace(content, kwargs={"norm": dict}), tmp_path / "new", license="mit")
    assert not (tmp_path / "new").exists()


def test_a_configuration_nested_too_deeply(saved, tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"config\.json: not readable as JSON"):
        hub.read_pretrained(tmp_path)


@pytest.fixture
def server(saved):
    """Answers as the Hub does for the files of the repository me/street."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def answer(self, body):
            owner, _, name = self.path.partition("/resolve/main/")
            file = saved / name
            found = owner == "/me/street" and name and file.is_file()
            whole = file.read_bytes() if found else b""
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(whole)))
            if found:
                self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
            else:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if body:
                self.wfile.write(whole)

        def log_message(self, format, *args):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{served.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    constants = huggingface_hub.constants
    with (
        mock.patch.object(constants, "ENDPOINT", address),
        mock.patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template),
    ):
        yield
    served.shutdown()


@pytest.mark.usefixtures("server")
def test_a_repository_is_downloaded_once(content, tmp_path):
    same(hub.read_pretrained("me/street", cache_dir=tmp_path), content)
    same(hub.read_pretrained("me/street", cache_dir=tmp_path, local_files_only=True), content)
    with pytest.raises(UserError, match="me/other: neither a folder nor a model of the Hub"):
        hub.read_pretrained("me/other", cache_dir=tmp_path)


def test_push_uploads_the_folder(content):
    uploaded: dict[str, Any] = {}

    class Api:
        def __init__(self, token):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            assert (private, exist_ok) == (True, True)
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, revision, commit_message):
            uploaded["model"] = hub.read_pretrained(folder_path)
            uploaded["card"] = huggingface_hub.ModelCard.load(f"{folder_path}/README.md").text
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    with mock.patch.object(huggingface_hub, "HfApi", Api):
        address = hub.push_to_hub(content, "me/street", license="mit", private=True, token="secret")
    assert address == "https://hub/me/street/commit/1"
    same(uploaded["model"], content)
    assert 'load("me/street")' in uploaded["card"]
