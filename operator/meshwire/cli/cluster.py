"""Reading a cluster with the official client, which knows every way a kubeconfig can authenticate."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import click

from meshwire.api import names

Object = dict[str, Any]
Command = TypeVar("Command", bound=Callable[..., Any])

API: Final = f"/apis/{names.API_VERSION}"
TIMEOUT: Final = (5, 30)
"""Seconds to connect, and to wait for an answer."""


class ClusterUnavailable(Exception):
    """The cluster can't be asked; the text is one line for the person at the terminal."""


class NoKubeconfig(ClusterUnavailable):
    """Nothing says where a cluster is."""


class Forbidden(ClusterUnavailable):
    """The API server knows who asks and refuses."""


class NotFound(Exception):
    """The API server knows no such object or resource."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which cluster: as in kubectl, None is $KUBECONFIG or ~/.kube/config, and its current context."""

    kubeconfig: str | None = None
    context: str | None = None

    def is_configured(self) -> bool:
        """Whether anything says that there is a cluster to ask; costs no import and no request."""
        if self.kubeconfig or self.context or os.environ.get("KUBECONFIG"):
            return True
        return (
            os.path.exists(os.path.expanduser("~/.kube/config")) or "KUBERNETES_SERVICE_HOST" in os.environ
        )


def options(command: Command) -> Command:
    """Adds --kubeconfig and --context to a command."""
    command = click.option("--context", help="Context of the kubeconfig; default: its current one.")(command)
    return click.option(
        "--kubeconfig",
        type=click.Path(dir_okay=False),
        help="Path of the kubeconfig; default: $KUBECONFIG, ~/.kube/config, or the pod's service account.",
    )(command)


class Reader:
    """Reads JSON from one API server, and patches it. Raises NotFound, Forbidden, and ClusterUnavailable for
    all else."""

    def __init__(self, choice: Choice) -> None:
        """Raises NoKubeconfig where there is none, ClusterUnavailable where it can't be used."""
        from kubernetes import client, dynamic

        configuration = client.Configuration()
        _load(choice, configuration)
        # urllib3 would try three more times, each with its own timeout, before saying what is wrong.
        configuration.retries = False
        self.server: str = configuration.host
        # The dynamic client takes and gives plain JSON; without a discoverer it asks nothing by itself.
        self._client = dynamic.DynamicClient(
            client.ApiClient(configuration), discoverer=lambda _client, _cache_file: None
        )

    def get(self, path: str, **query: str) -> Object:
        """The JSON answer to GET `path`."""
        return self._request("GET", path, query_params=list(query.items()))

    def find(self, path: str) -> Object | None:
        """The object, or None where there is none."""
        try:
            return self.get(path)
        except NotFound:
            return None

    def items(self, path: str, **query: str) -> list[Object]:
        """All objects of a list, sorted by name."""
        items: list[Object] = self.get(path, **query)["items"]
        return sorted(items, key=lambda item: str(item["metadata"]["name"]))

    def post(self, path: str, body: Object) -> Object:
        """The JSON answer to POST; used for access reviews only, which store nothing."""
        return self._request("POST", path, body=body)

    def patch(self, path: str, body: Object) -> Object:
        """The JSON answer to PATCH with a merge patch."""
        return self._request("PATCH", path, body=body, content_type="application/merge-patch+json")

    def _request(self, method: str, path: str, **arguments: Any) -> Object:
        import urllib3
        from kubernetes.client import ApiException

        try:
            response = self._client.request(
                method, path, serialize=False, _request_timeout=TIMEOUT, **arguments
            )
            answer: Object = json.loads(response.data)
            return answer
        except ApiException as error:
            match error.status:
                case 404:
                    raise NotFound(path) from None
                case 401:
                    raise ClusterUnavailable(
                        f"{self.server} does not accept the kubeconfig's credentials"
                    ) from None
                case 403:
                    raise Forbidden(f"{self.server} does not let you {method} {path}") from None
            raise ClusterUnavailable(f"{self.server} answers {error.status} {error.reason}") from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ClusterUnavailable(f"{self.server} can't be reached: {_reason(error)}") from None
        except ValueError:
            raise ClusterUnavailable(f"{self.server} answers something that is not JSON") from None


def _load(choice: Choice, configuration: Any) -> None:
    from kubernetes import config

    try:
        config.load_kube_config(choice.kubeconfig, choice.context, client_configuration=configuration)
        return
    except config.ConfigException as error:
        if choice.kubeconfig or choice.context:
            raise ClusterUnavailable(f"the kubeconfig can't be used: {_reason(error)}") from None
        reason = _reason(error)
    except Exception as error:
        # Not YAML, a missing certificate file, an exec plugin that fails: every cause raises something else.
        raise ClusterUnavailable(f"the kubeconfig can't be used: {_reason(error)}") from None
    try:
        config.load_incluster_config(configuration)
    except config.ConfigException:
        raise NoKubeconfig(f"no cluster to ask: {reason}") from None


def _reason(error: BaseException) -> str:
    """The error's text on one line, without the repr of the connection that urllib3 puts in front."""
    words = " ".join(str(error).split())
    return words.rpartition("object at 0x")[2].partition(">: ")[2] or words
