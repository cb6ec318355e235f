// Java's own HttpClient, as it is: each call offers to change to HTTP/2.

import java.io.IOException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.net.http.HttpTimeoutException;
import java.time.Duration;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

public class Talk {
    interface Check {
        void run() throws Exception;
    }

    static final String URL = System.getenv("HEADRACE_URL");
    static final String SLOW = System.getenv("HEADRACE_SLOW_URL");
    static final String ASK = "\"messages\": [{\"role\": \"user\", \"content\": \"What is the capital of France?\"}]";
    static final HttpClient client = HttpClient.newHttpClient();

    static HttpRequest.Builder call(String base, String path, String body) {
        return HttpRequest.newBuilder(URI.create(base + path)).POST(BodyPublishers.ofString("{" + body + "}"));
    }

    static HttpResponse<String> sent(HttpRequest.Builder builder) throws Exception {
        return client.send(builder.build(), BodyHandlers.ofString());
    }

    static void holds(boolean fact, String what) {
        if (!fact) throw new AssertionError(what);
    }

    static int count(String base, String state) throws Exception {
        String stats = client.send(HttpRequest.newBuilder(URI.create(base + "/queue/stats")).build(),
                BodyHandlers.ofString()).body();
        Matcher found = Pattern.compile("\"(?:high|medium|low)\":\\{[^{}]*\"" + state + "\":(\\d+)").matcher(stats);
        int sum = 0;
        while (found.find()) sum += Integer.parseInt(found.group(1));
        return sum;
    }

    static void until(String base, String state, int wanted) throws Exception {
        long giveUpAt = System.nanoTime() + 30_000_000_000L;
        while (count(base, state) != wanted) {
            holds(System.nanoTime() < giveUpAt, "not within 30 s: " + wanted + " " + state);
            Thread.sleep(50);
        }
    }

    static void check(String name, Check check) {
        String result = "yes";
        String note = "";
        try {
            check.run();
        } catch (Throwable error) {
            error.printStackTrace();
            result = "no";
            note = String.valueOf(error).replaceAll("[\"\\\\\\p{Cntrl}]", " ");
        }
        System.out.printf("{\"check\": \"%s\", \"result\": \"%s\", \"note\": \"%s\"}%n", name, result, note);
    }

    public static void main(String[] arguments) {
        check("chat", () -> {
            HttpResponse<String> answer = sent(call(URL, "/v1/chat/completions", ASK));
            holds(answer.statusCode() == 200 && answer.body().contains("Paris"), answer.body());
        });
        check("stream", () -> {
            HttpRequest request = call(URL, "/v1/chat/completions", ASK + ", \"stream\": true").build();
            String text = String.join("\n", client.send(request, BodyHandlers.ofLines()).body().toList());
            holds(text.contains("Paris") && text.contains("[DONE]"), text);
        });
        check("errors", () -> {
            HttpResponse<String> answer = sent(call(URL, "/v1/chat/completions", "\"model\": \"no-such-model\", " + ASK));
            holds(answer.statusCode() == 404 && answer.body().contains("no-such-model"), answer.body());
        });
        check("cancel", () -> {
            int before = count(SLOW, "cancelled");
            HttpRequest request = call(SLOW, "/v1/chat/completions", ASK + ", \"stream\": true").build();
            try (var body = client.send(request, BodyHandlers.ofInputStream()).body()) {
                holds(body.read() >= 0, "no stream");
            }
            until(SLOW, "cancelled", before + 1);
        });
        check("retry", () -> {
            int before = count(SLOW, "done");
            HttpRequest.Builder hasty = call(SLOW, "/v1/chat/completions", ASK).timeout(Duration.ofSeconds(1))
                    .header("Idempotency-Key", "retry-java-" + ProcessHandle.current().pid());
            int status = 0;
            for (int tries = 0; tries < 9 && status == 0; tries++) {
                try {
                    status = sent(hasty).statusCode();
                } catch (HttpTimeoutException error) {
                    continue;
                }
            }
            holds(status == 200, "status " + status);
            until(SLOW, "done", before + 1);
        });
        check("priority", () -> {
            int before = count(URL, "done");
            HttpResponse<String> answer = sent(call(URL, "/v1/chat/completions", ASK).header("X-Priority", "high"));
            holds(answer.body().contains("\"priority\":\"high\""), answer.body());
            until(URL, "done", before + 1);
        });
        System.exit(0);
    }
}
