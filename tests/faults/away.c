// Makes the files below $AWAY_ROOT fail with ESTALE, EIO, ETIMEDOUT or EMFILE while the file
// $AWAY_FLAG exists, in a process that loads this library with LD_PRELOAD.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

static int away(const char *path) {
  static const int errors[] = {ESTALE, EIO, ETIMEDOUT, EMFILE};
  static unsigned count;
  const char *root = getenv("AWAY_ROOT"), *flag = getenv("AWAY_FLAG");
  if (!root || !flag || !path || strncmp(path, root, strlen(root))) return 0;
  int before = errno;
  if (syscall(SYS_faccessat, AT_FDCWD, flag, F_OK, 0)) {
    errno = before;
    return 0;
  }
  errno = errors[count++ % 4];
  return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(type, name, failed, path, parameters, arguments) \
  type name parameters { return away(path) ? failed : NEXT(name) arguments; }
#define WRAP_OPEN(name, path, parameters, arguments) \
  int name parameters {                              \
    va_list rest;                                    \
    va_start(rest, flags);                           \
    mode_t mode = va_arg(rest, mode_t);              \
    va_end(rest);                                    \
    return away(path) ? -1 : NEXT(name) arguments;   \
  }

WRAP_OPEN(open, path, (const char *path, int flags, ...), (path, flags, mode))
WRAP_OPEN(open64, path, (const char *path, int flags, ...), (path, flags, mode))
WRAP_OPEN(openat, path, (int at, const char *path, int flags, ...), (at, path, flags, mode))
WRAP_OPEN(openat64, path, (int at, const char *path, int flags, ...), (at, path, flags, mode))
WRAP(FILE *, fopen, NULL, path, (const char *path, const char *mode), (path, mode))
WRAP(FILE *, fopen64, NULL, path, (const char *path, const char *mode), (path, mode))
WRAP(DIR *, opendir, NULL, path, (const char *path), (path))
WRAP(int, access, -1, path, (const char *path, int mode), (path, mode))
WRAP(int, stat, -1, path, (const char *path, struct stat *out), (path, out))
WRAP(int, lstat, -1, path, (const char *path, struct stat *out), (path, out))
WRAP(int, stat64, -1, path, (const char *path, struct stat64 *out), (path, out))
WRAP(int, lstat64, -1, path, (const char *path, struct stat64 *out), (path, out))
WRAP(int, fstatat, -1, path, (int at, const char *path, struct stat *out, int flags),
     (at, path, out, flags))
WRAP(int, fstatat64, -1, path, (int at, const char *path, struct stat64 *out, int flags),
     (at, path, out, flags))
WRAP(int, statvfs, -1, path, (const char *path, struct statvfs *out), (path, out))
WRAP(int, statvfs64, -1, path, (const char *path, struct statvfs64 *out), (path, out))
WRAP(int, rename, -1, path, (const char *path, const char *to), (path, to))
WRAP(int, renameat, -1, path, (int at, const char *path, int to, const char *name),
     (at, path, to, name))
WRAP(int, mkdir, -1, path, (const char *path, mode_t mode), (path, mode))
WRAP(int, mkdirat, -1, path, (int at, const char *path, mode_t mode), (at, path, mode))
WRAP(int, unlink, -1, path, (const char *path), (path))
WRAP(int, unlinkat, -1, path, (int at, const char *path, int flags), (at, path, flags))
WRAP(int, rmdir, -1, path, (const char *path), (path))
