"""Reflection, so that a stranger with grpcurl can list, describe and call."""

from collections.abc import Sequence

import grpc
from google.protobuf import descriptor, descriptor_pool
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection


class _MethodPool:
    """The default descriptor pool, which also finds the file of a method: protobuf's own finds no methods."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def FindFileByName(self, name: str) -> descriptor.FileDescriptor:
        return self._pool.FindFileByName(name)

    def FindFileContainingSymbol(self, symbol: str) -> descriptor.FileDescriptor:
        """Raises KeyError for a symbol that nobody defines."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service_name, _, method_name = symbol.rpartition(".")
            service = self._pool.FindServiceByName(service_name)
            if method_name not in service.methods_by_name:
                raise
            return service.file

    def FindMessageTypeByName(self, name: str) -> descriptor.Descriptor:
        return self._pool.FindMessageTypeByName(name)

    def FindExtensionByNumber(self, extended: descriptor.Descriptor, number: int) -> descriptor.FieldDescriptor:
        return self._pool.FindExtensionByNumber(extended, number)

    def FindAllExtensions(self, extended: descriptor.Descriptor) -> list[descriptor.FieldDescriptor]:
        return self._pool.FindAllExtensions(extended)


def enable_reflection(service_names: Sequence[str], server: grpc.aio.Server) -> None:
    """Adds reflection of `service_names`, health and itself to a server that has not started."""
    names = (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, pool=_MethodPool())  # type: ignore[arg-type]
