"""A small library that the system loads before all others, and that lets nothing leave this machine.

It stands between each program, native code included, and the system's functions, notes what would leave, and refuses it.
"""
import shutil
import subprocess
import sys
from pathlib import Path

GUARD = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void note(const char *what, const char *where) {
    char line[600];
    int n = snprintf(line, sizeof line, "%s %s\n", what, where), file = open(getenv("NETWORK_LOG"), O_WRONLY | O_APPEND | O_CREAT, 0600);
    if (file >= 0) { if (write(file, line, n) < 0) {} close(file); }
}
static int leaves(const char *what, const struct sockaddr *to) {
    char text[INET6_ADDRSTRLEN] = "";
    if (!to) return 0;
    if (to->sa_family == AF_INET) {
        const struct in_addr *a = &((const struct sockaddr_in *)to)->sin_addr;
        if (ntohl(a->s_addr) >> 24 == 127 || a->s_addr == 0) return 0;
        inet_ntop(AF_INET, a, text, sizeof text);
    } else if (to->sa_family == AF_INET6) {
        const struct in6_addr *a = &((const struct sockaddr_in6 *)to)->sin6_addr;
        if (IN6_IS_ADDR_LOOPBACK(a) || IN6_IS_ADDR_UNSPECIFIED(a)) return 0;
        if (IN6_IS_ADDR_V4MAPPED(a) && a->s6_addr[12] == 127) return 0;
        inet_ntop(AF_INET6, a, text, sizeof text);
    } else return 0;
    note(what, text);
    errno = ENETUNREACH;
    return 1;
}
int connect(int s, const struct sockaddr *to, socklen_t n) {
    int (*real)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    return leaves("connect", to) ? -1 : real(s, to, n);
}
ssize_t sendto(int s, const void *data, size_t size, int flags, const struct sockaddr *to, socklen_t n) {
    ssize_t (*real)(int, const void *, size_t, int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "sendto");
    return leaves("sendto", to) ? -1 : real(s, data, size, flags, to, n);
}
int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **) = dlsym(RTLD_NEXT, "getaddrinfo");
    unsigned char address[16];
    int numeric = !name || inet_pton(AF_INET, name, address) || inet_pton(AF_INET6, name, address);
    if (numeric || !strcmp(name, "localhost")) return real(name, service, hints, found);
    note("getaddrinfo", name);
    return EAI_FAIL;
}
struct hostent *gethostbyname(const char *name) {
    struct hostent *(*real)(const char *) = dlsym(RTLD_NEXT, "gethostbyname");
    if (!strcmp(name, "localhost")) return real(name);
    note("gethostbyname", name);
    return NULL;
}
"""


def build_guard(folder: Path) -> Path | None:
    "The library for LD_PRELOAD, which notes in the file NETWORK_LOG; None where there is neither Linux nor a C compiler."
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None: return None
    (folder/"guard.c").write_text(GUARD)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", folder/"guard.so", folder/"guard.c", "-ldl"], check=True)
    return folder/"guard.so"


def noted(log: Path) -> list[str]:
    "What was tried."
    return log.read_text().splitlines() if log.exists() else []
