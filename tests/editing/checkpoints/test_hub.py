"""Pushing to the hub, against a hub that only notes what it is asked."""

from types import MappingProxyType

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import filter_repo_objects

from editing.checkpoints.hub import push, require_pushable
from neurons.errors import BrocaError, UsageError


class FakeHub:
    """Takes HfApi's place; ``fails`` is raised by the call of that name."""

    asked = ()
    fails = MappingProxyType({})

    def create_repo(self, repo_id, **settings):
        self.asked.append(("create_repo", repo_id, settings))
        self._fail("create_repo")
        owner = "" if "/" in repo_id else "me/"
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{owner}{repo_id}")

    def upload_folder(self, **settings):
        self.asked.append(("upload_folder", settings.pop("repo_id"), settings))
        self._fail("upload_folder")

    def _fail(self, name):
        if name in self.fails:
            raise self.fails[name]


@pytest.fixture
def hub(monkeypatch):
    hub = type("Hub", (FakeHub,), {"asked": [], "fails": {}})
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


@pytest.fixture(params=["config.json", "adapter_config.json"])
def directory(request, tmp_path):
    (tmp_path / request.param).write_text("{}")
    return tmp_path


def refusal(status):
    """What the hub's client raises for an answer with this status."""

    class Response:
        status_code = status
        headers = MappingProxyType({})
        request = None

    return HfHubHTTPError(f"{status} from the hub\nRequest ID: 7", response=Response())


def test_makes_the_repository_and_uploads_all(hub, directory):
    assert push(directory, "someone/steered") == "https://huggingface.co/someone/steered"
    (name, repo, made), (then, where, sent) = hub.asked
    assert (name, repo, made) == ("create_repo", "someone/steered", {"private": False, "exist_ok": True})
    assert (then, where) == ("upload_folder", "someone/steered")
    assert sent["folder_path"] == directory and sent["repo_type"] == "model"
    # What loaders would take from an earlier push: shards or one file, a model or an adapter.
    earlier = [
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "config.json",
    ]
    earlier += [
        "adapter_config.json",
        "adapter_model.safetensors",
        "broca/edit.safetensors",
        "broca/recipe.toml",
    ]
    kept = ["README.md", "tokenizer.json", "chat_template.jinja", "notes/broca.txt"]
    assert [*filter_repo_objects([*earlier, *kept], allow_patterns=sent["delete_patterns"])] == earlier


def test_a_private_one_under_ones_own_name(hub, directory):
    assert push(directory, "steered", private=True) == "https://huggingface.co/me/steered"
    assert hub.asked[0][2]["private"] is True
    assert hub.asked[1][1] == "me/steered"


def test_refuses_what_is_no_model_before_it_asks(hub, tmp_path):
    with pytest.raises(UsageError, match=r"config\.json"):
        push(tmp_path, "someone/steered")
    with pytest.raises(UsageError, match="nothing to push"):
        push(tmp_path / "absent", "someone/steered")
    assert hub.asked == []


def test_what_can_be_pushed_is_told_without_asking(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_none")
    for repo in ("steered", "someone/steered-1.5_b"):
        require_pushable(repo)
    for repo in ("", "a/b/c", "someone/", "some one/steered", "someone/-steered", "someone/steered.git"):
        with pytest.raises(UsageError, match="owner/name"):
            require_pushable(repo)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BrocaError, match="HF_HUB_OFFLINE"):
        require_pushable("steered")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(BrocaError, match="hf auth login"):
        require_pushable("steered")
    assert hub.asked == []


@pytest.mark.parametrize("call", ["create_repo", "upload_folder"])
@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (HFValidationError("bad name"), UsageError, "owner/name"),
        (OfflineModeIsEnabled("offline"), BrocaError, "HF_HUB_OFFLINE"),
        (LocalTokenNotFoundError("no token"), BrocaError, "hf auth login"),
        (refusal(401), BrocaError, r"refuses the token \(401\)"),
        (refusal(403), BrocaError, r"refuses the token \(403\)"),
        (refusal(500), BrocaError, "the hub says: 500 from the hub$"),
        (HTTPError("no route to host"), BrocaError, r"cannot be reached \(no route to host\)"),
        (ConnectionError("connection reset"), BrocaError, r"cannot be reached \(connection reset\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_in_one_sentence(hub, directory, call, error, kind, says):
    hub.fails[call] = error
    with pytest.raises(kind, match=says) as found:
        push(directory, "someone/steered")
    assert isinstance(found.value, UsageError) == (kind is UsageError)
    assert "\n" not in str(found.value) and "someone/steered" in str(found.value)


def test_mistakes_of_ours_are_not_the_hubs(hub, directory):
    hub.fails["upload_folder"] = TypeError("a bug")
    with pytest.raises(TypeError):
        push(directory, "someone/steered")
