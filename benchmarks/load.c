/* The game that both are measured with: keeps a number of states in flight, and times each answer.
 *
 *     load PORT STATE_TOPIC ACTION_TOPIC QOS IN_FLIGHT SECONDS < state.json
 *
 * Each "########" in the state becomes the message's number, which the answer must contain as "id":"<number>".
 * SIGUSR1 begins a new phase, SIGTERM ends the run early. Prints one line of JSON per phase.
 */
#define _GNU_SOURCE
#include <mosquitto.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MOST = 4 << 20, MOST_BYTES = 1 << 16, FIRST = 10000000, MOST_PLACES = 8, PHASES = 16 };

struct phase {
    long answered, errors, first_latency;
    double began, ended, longest_gap;
};

static const char *action_topic;
static int qos;
static volatile sig_atomic_t ready, stop, marks;
static double *sent_at;
static float *latency_us;
static long sent, answered, twice;
static struct phase phases[PHASES];
static int phase;
static double last_answer;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void *find(const void *hay, size_t length, const char *needle) {
    size_t width = strlen(needle);
    const char *at = hay, *end = at + length - width;
    for (; length >= width && at <= end; at++)
        if (!memcmp(at, needle, width)) return (void *)at;
    return NULL;
}

static void connected(struct mosquitto *client, void *context, int reason) {
    (void)context;
    if (reason) exit(1);
    mosquitto_subscribe(client, NULL, action_topic, qos);
}

static void subscribed(struct mosquitto *client, void *context, int packet, int count, const int *granted) {
    (void)client, (void)context, (void)packet, (void)count, (void)granted;
    ready = 1;
}

static void arrived(struct mosquitto *client, void *context, const struct mosquitto_message *message) {
    (void)client, (void)context;
    double at = now();
    const char *id = find(message->payload, message->payloadlen, "\"id\":\"");
    long number = id ? atol(id + 6) - FIRST : -1;
    if (number < 0 || number >= sent) return; /* of an earlier run */
    if (sent_at[number] == 0) {
        twice++;
        return;
    }
    latency_us[answered++] = (at - sent_at[number]) * 1e6;
    sent_at[number] = 0;
    struct phase *here = &phases[phase];
    here->answered++;
    if (find(message->payload, message->payloadlen, "\"error\"")) here->errors++;
    if (last_answer && at - last_answer > here->longest_gap) here->longest_gap = at - last_answer;
    last_answer = at;
}

static void signalled(int number) {
    if (number == SIGUSR1) marks++;
    else stop = 1;
}

static int ascending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void print(const struct phase *one, long lost) {
    float *from = latency_us + one->first_latency;
    long n = one->answered;
    qsort(from, n, sizeof *from, ascending);
    printf("{\"answered\": %ld, \"errors\": %ld, \"lost\": %ld, \"twice\": %ld, \"seconds\": %.6f, \"p50_us\": %.1f, "
           "\"p99_us\": %.1f, \"longest_us\": %.1f, \"longest_gap_ms\": %.3f}\n",
           n, one->errors, lost, twice, one->ended - one->began, n ? from[n / 2] : 0, n ? from[n * 99 / 100] : 0,
           n ? from[n - 1] : 0, one->longest_gap * 1e3);
}

int main(int argc, char **argv) {
    if (argc != 7) return 2;
    action_topic = argv[3];
    qos = atoi(argv[4]);
    long in_flight = atol(argv[5]);
    double seconds = atof(argv[6]);

    static char state[MOST_BYTES];
    size_t length = fread(state, 1, sizeof state, stdin);
    char *places[MOST_PLACES];
    int count = 0;
    for (char *at = state; count < MOST_PLACES && (at = find(at, state + length - at, "########")); at += 8)
        places[count++] = at;
    sent_at = calloc(MOST, sizeof *sent_at);
    latency_us = calloc(MOST, sizeof *latency_us);
    if (!count || !sent_at || !latency_us) return 1;
    signal(SIGUSR1, signalled);
    signal(SIGTERM, signalled);

    mosquitto_lib_init();
    struct mosquitto *client = mosquitto_new(NULL, true, NULL);
    if (!client) return 1;
    mosquitto_int_option(client, MOSQ_OPT_TCP_NODELAY, 1);
    mosquitto_max_inflight_messages_set(client, 0);
    mosquitto_connect_callback_set(client, connected);
    mosquitto_subscribe_callback_set(client, subscribed);
    mosquitto_message_callback_set(client, arrived);
    if (mosquitto_connect(client, "127.0.0.1", atoi(argv[1]), 60)) return 1;
    while (!ready && !stop)
        if (mosquitto_loop(client, 100, 1)) return 1;

    double began = now(), drained = 0;
    long given_up = 0;
    phases[0].began = began;
    while (!drained || (answered < sent && now() < drained)) {
        if (marks > phase && phase < PHASES - 1) {
            phases[phase].ended = now();
            phase++;
            phases[phase].began = phases[phase - 1].ended;
            phases[phase].first_latency = answered;
        }
        if (!drained && (stop || now() - began > seconds || sent >= MOST - in_flight)) {
            phases[phase].ended = now();
            drained = now() + 3;
        }
        while (!drained && sent - answered < in_flight + given_up) {
            char number[24];
            snprintf(number, sizeof number, "%ld", FIRST + sent);
            for (int i = 0; i < count; i++) memcpy(places[i], number, 8);
            sent_at[sent++] = now();
            if (mosquitto_publish(client, NULL, argv[2], length, state, qos, false)) return 1;
        }
        if (mosquitto_loop(client, 20, 1)) return 1;
        if (!drained && last_answer && now() - last_answer > 1) { /* what was lost must not end the run */
            given_up = sent - answered;
            last_answer = now();
        }
    }
    for (int i = 0; i <= phase; i++) print(&phases[i], sent - answered);
    return 0;
}
