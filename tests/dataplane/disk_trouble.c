/* A disk in trouble, for one process: preloaded, it counts the file operations below a directory, makes each of them
 * slow, and kills the process just before operation number `kill_at` (a write is torn: half of it is done). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char place[4096];
static long kill_at = -1, delay_us = 0, done = 0;

void disk_trouble(const char *directory, long at, long delay) {
  snprintf(place, sizeof place, "%s", directory);
  kill_at = at, delay_us = delay, done = 0;
}

long disk_trouble_done(void) { return done; }

static int below(const char *path) { return *place && !strncmp(path, place, strlen(place)); }

static int open_below(int fd) {
  char link[64], path[4096];
  if (!*place) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return below(path);
}

static int at_below(int fd, const char *path) { return path[0] == '/' ? below(path) : fd != AT_FDCWD && open_below(fd); }

static int last_one(void) { return done++ == kill_at; }

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

static void meet(void) {
  if (delay_us) usleep(delay_us);
  if (last_one()) die();
}

#define REAL(name, ...) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name); return real(__VA_ARGS__)
#define MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
#define CHANGES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT))

int open(const char *path, int flags, ...) { MODE(flags) if (CHANGES(flags) && below(path)) meet(); REAL(open, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) if (CHANGES(flags) && below(path)) meet(); REAL(open64, path, flags, mode); }
int openat(int fd, const char *path, int flags, ...) { MODE(flags) if (CHANGES(flags) && at_below(fd, path)) meet(); REAL(openat, fd, path, flags, mode); }
int openat64(int fd, const char *path, int flags, ...) { MODE(flags) if (CHANGES(flags) && at_below(fd, path)) meet(); REAL(openat64, fd, path, flags, mode); }
int fsync(int fd) { if (open_below(fd)) meet(); REAL(fsync, fd); }
int fdatasync(int fd) { if (open_below(fd)) meet(); REAL(fdatasync, fd); }
int mkdir(const char *path, mode_t mode) { if (below(path)) meet(); REAL(mkdir, path, mode); }
int rmdir(const char *path) { if (below(path)) meet(); REAL(rmdir, path); }
int unlink(const char *path) { if (below(path)) meet(); REAL(unlink, path); }
int unlinkat(int fd, const char *path, int flags) { if (at_below(fd, path)) meet(); REAL(unlinkat, fd, path, flags); }
int rename(const char *from, const char *to) { if (below(from)) meet(); REAL(rename, from, to); }
int renameat(int a, const char *from, int b, const char *to) { if (at_below(a, from)) meet(); REAL(renameat, a, from, b, to); }
int ftruncate64(int fd, off64_t size) { if (open_below(fd)) meet(); REAL(ftruncate64, fd, size); }

ssize_t write(int fd, const void *data, size_t size) {
  static __typeof__(write) *real;
  if (!real) real = dlsym(RTLD_NEXT, "write");
  if (!open_below(fd)) return real(fd, data, size);
  if (delay_us) usleep(delay_us);
  if (last_one()) {
    real(fd, data, size / 2);
    die();
  }
  return real(fd, data, size);
}
