-- Put back what a log lacks of the keys: public records that are missing or behind, and one region's wrapped private
-- halves that are missing. KEYS: keys, epoch, private. ARGV: number, nonce, how many records, then per record its kid and
-- the record (JSON), then per private half its kid and envelope. Returns {how many were put back}.
local refusal = check_epoch(KEYS[2], ARGV[1], ARGV[2])
if refusal then
  return refusal
end

local order = {prepared = 0, published = 1, active = 2, retiring = 3, removed = 4, compromised = 5}
local count, changed, behind = tonumber(ARGV[3]), 0, {}
for i = 4, 3 + 2 * count, 2 do  -- decided before anything is written: an error half-way would leave keys_n as it was
  local held, mine = redis.call('HGET', KEYS[1], ARGV[i]), cjson.decode(ARGV[i + 1])
  local readable, other = pcall(cjson.decode, held or 'null')
  local state = readable and type(other) == 'table' and order[other.state]
  if not held or (state and (order[mine.state] > state or (order[mine.state] == state and mine.rev > other.rev))) then
    behind[#behind + 1] = i
  end
end
for _, i in ipairs(behind) do
  redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  changed = changed + 1
end
if changed > 0 then
  redis.call('HINCRBY', KEYS[2], 'keys_n', 1)
end
for i = 4 + 2 * count, #ARGV, 2 do
  changed = changed + redis.call('HSETNX', KEYS[3], ARGV[i], ARGV[i + 1])
end
return {changed}
