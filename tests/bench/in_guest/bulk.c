/* The same as bulk.py, in C. */
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static char block[65536];

static int take(int port, long count)
{
    while (count > 0) {
        ssize_t got = read(port, block, sizeof block);
        if (got < 0)
            return 2;
        count -= got;
    }
    return write(port, ".", 1) == 1 ? 0 : 3;
}

static int give(int port, long count)
{
    while (count > 0) {
        ssize_t put = write(port, block, count < (long)sizeof block ? (size_t)count : sizeof block);
        if (put < 0)
            return 3;
        count -= put;
    }
    return 0;
}

int main(int argc, char **argv)
{
    int port = argc == 2 ? open(argv[1], O_RDWR) : -1;
    int status = port < 0;

    while (status == 0) {
        char line[64], verb[8];
        long count;
        struct pollfd waiting = {.fd = port, .events = POLLIN};
        ssize_t got = poll(&waiting, 1, -1) < 0 ? -1 : read(port, line, sizeof line - 1);
        if (got <= 0) {
            usleep(20000); /* no host is there yet */
            continue;
        }
        line[got] = 0;
        if (sscanf(line, "%7s %ld", verb, &count) != 2)
            return 1;
        status = strcmp(verb, "take") == 0 ? take(port, count) : give(port, count);
    }
    return status;
}
