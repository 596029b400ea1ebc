/* Loaded before the C library: the wall clock is off by CLOCK_OFFSET_S seconds. Clocks that measure time are not. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

typedef int (*clock_function)(clockid_t, struct timespec *);

int clock_gettime(clockid_t clock, struct timespec *now)
{
    clock_function real = (clock_function)dlsym(RTLD_NEXT, "clock_gettime");
    const char *offset = getenv("CLOCK_OFFSET_S");
    int result = real(clock, now);

    if (result == 0 && clock == CLOCK_REALTIME && offset)
        now->tv_sec += atoll(offset);
    return result;
}

time_t time(time_t *seconds)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    if (seconds)
        *seconds = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *now, void *zone)
{
    struct timespec precise;

    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
