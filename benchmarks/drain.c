/* The yardstick of a transfer: takes so many bytes from a topic at QoS 1, as fast as libmosquitto can, and forgets them.
 *
 *     drain PORT TOPIC_FILTER BYTES
 *
 * What mosquitto_sub does with its output thrown away. Prints the seconds from the first message to the last.
 */
#include <mosquitto.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static const char *filter;
static long wanted, received;
static double first;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void connected(struct mosquitto *client, void *context, int reason) {
    (void)context;
    if (reason) exit(1);
    mosquitto_subscribe(client, NULL, filter, 1);
}

static void subscribed(struct mosquitto *client, void *context, int packet, int count, const int *granted) {
    (void)client, (void)context, (void)packet, (void)count, (void)granted;
    puts("ready");
    fflush(stdout);
}

static void arrived(struct mosquitto *client, void *context, const struct mosquitto_message *message) {
    (void)context;
    if (!received) first = now();
    received += message->payloadlen;
    if (received >= wanted) {
        printf("%.6f\n", now() - first);
        mosquitto_disconnect(client);
    }
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    filter = argv[2];
    wanted = atol(argv[3]);
    mosquitto_lib_init();
    struct mosquitto *client = mosquitto_new(NULL, true, NULL);
    if (!client) return 1;
    mosquitto_int_option(client, MOSQ_OPT_TCP_NODELAY, 1);
    mosquitto_connect_callback_set(client, connected);
    mosquitto_subscribe_callback_set(client, subscribed);
    mosquitto_message_callback_set(client, arrived);
    if (mosquitto_connect(client, "127.0.0.1", atoi(argv[1]), 60)) return 1;
    mosquitto_loop_forever(client, -1, 1);
    return received >= wanted ? 0 : 1;
}
